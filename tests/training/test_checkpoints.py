"""Checkpoints: what is written comes back exactly, and a checkpoint is whole or absent."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.errors import RunError
from slimtune.training import checkpoint


def fill(folder):
    (folder / "weights").write_bytes(b"1234")
    (folder / "state.json").write_text("{}")


@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 4), lr=st.floats(1e-6, 1e-1), seed=st.integers(0, 1000))
def test_an_optimizer_is_restored_exactly(tmp_path_factory, steps, lr, seed):
    folder = tmp_path_factory.mktemp("o")

    def make():
        torch.manual_seed(seed)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))

    def step(model, optimizer, i):
        model(torch.full((2, 4), float(i))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for i in range(steps):
        step(model, optimizer, i)
    checkpoint.save_optimizer(folder, optimizer.state_dict())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer, 9)
    again, resumed = make()
    again.load_state_dict(weights)
    resumed.load_state_dict(checkpoint.load_optimizer(folder))
    step(again, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_random_number_generators_are_restored(tmp_path):
    checkpoint.save_rng_state(tmp_path)
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    checkpoint.load_rng_state(tmp_path)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


def test_a_checkpoint_is_complete_or_absent(tmp_path):
    checkpoint.write_checkpoint(tmp_path, 1, fill)

    def breaks(folder):
        fill(folder)
        raise KeyError("killed here")

    with pytest.raises(KeyError):
        checkpoint.write_checkpoint(tmp_path, 2, breaks)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: (f / "weights").write_bytes(b"1235"), "weights is damaged"),
        (lambda f: (f / "weights").write_bytes(b"12"), "weights is damaged"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda f: (f / "checksums.json").unlink(), "checksums.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm, fault):
    for step in (9, 10):  # by number, not by name
        checkpoint.write_checkpoint(tmp_path, step, fill)
    harm(tmp_path / "checkpoint-10")
    said = []
    assert checkpoint.find_newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 1
    assert fault in said[0]
    harm(tmp_path / "checkpoint-9")
    with pytest.raises(RunError, match="damaged"):
        checkpoint.find_newest_checkpoint(tmp_path, said.append)


def test_a_partial_checkpoint_is_removed(tmp_path):
    checkpoint.write_checkpoint(tmp_path, 1, fill)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp" / "weights").write_bytes(b"12")
    said = []
    assert checkpoint.find_newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert "was being written when the run stopped" in said[0]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.write_checkpoint(tmp_path, step, fill)
    checkpoint.delete_old_checkpoints(tmp_path, keep=2, best_step=4)
    assert [checkpoint.checkpoint_step(p) for p in checkpoint.list_checkpoints(tmp_path)] == [4, 8, 10]
    assert json.loads((tmp_path / "checkpoint-4" / "checksums.json").read_text()).keys() == {"weights", "state.json"}
