"""Checkpoints: what is written comes back exactly, and a checkpoint is whole or absent."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.core.training import checkpoint
from slimtune.errors import RunError


def fill(folder):
    for name in checkpoint.REQUIRED_FILES:
        (folder / name).write_text("1234")


def replace_by_file(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("no folder")


@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 4), lr=st.floats(1e-6, 1e-1), seed=st.integers(0, 1000))
def test_optimizer_is_restored_exactly(tmp_path_factory, steps, lr, seed):
    folder = tmp_path_factory.mktemp("o")
    torch.manual_seed(seed)
    models = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    first, second = (torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95)) for m in models)

    def step(model, optimizer, i):
        model(torch.full((2, 4), float(i))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(steps):
        step(models[0], first, i)
    checkpoint.save_optimizer(folder, first.state_dict())
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(checkpoint.load_optimizer(folder))
    step(models[0], first, 9)
    step(models[1], second, 9)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_random_number_generators_are_restored(tmp_path):
    checkpoint.save_rng_state(tmp_path)
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    checkpoint.restore_rng_state(tmp_path)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


def test_failed_checkpoint_leaves_nothing(tmp_path):
    checkpoint.write_checkpoint(tmp_path, 1, fill)

    def breaks(folder):
        fill(folder)
        raise KeyError

    with pytest.raises(KeyError):
        checkpoint.write_checkpoint(tmp_path, 2, breaks)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "rng.json").write_bytes(b"1235"), "rng.json is damaged"),
        (lambda f: (f / "rng.json").unlink(), "rng.json is missing"),
        (lambda f: (f / "checksums.json").write_text("{"), "checksums.json is damaged"),
        (lambda f: (f / "checksums.json").unlink(), "checksums.json"),
        (lambda f: (f / "checksums.json").write_text("{}"), "does not name 'adapter_config.json'"),
        (lambda f: (f / "checksums.json").write_text("[]"), "it contains a list"),
        (lambda f: (f / "checksums.json").write_text("null"), "it contains null"),
        (replace_by_file, "checksums.json"),
    ],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, damage, message):
    for step in (9, 10):  # by number, not by name
        checkpoint.write_checkpoint(tmp_path, step, fill)
    damage(tmp_path / "checkpoint-10")
    messages = []
    assert checkpoint.find_newest_undamaged_checkpoint(tmp_path, messages.append) == tmp_path / "checkpoint-9"
    assert [message in m for m in messages] == [True]
    assert (tmp_path / "damaged-checkpoint-10").exists()
    damage(tmp_path / "checkpoint-9")
    with pytest.raises(RunError, match="damaged"):
        checkpoint.find_newest_undamaged_checkpoint(tmp_path, messages.append)


def test_partial_checkpoint_is_removed(tmp_path):
    checkpoint.write_checkpoint(tmp_path, 1, fill)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp" / "weights").write_bytes(b"12")
    (tmp_path / ".checkpoint-3.tmp").write_bytes(b"a file")
    (tmp_path / "checkpoint-²").mkdir()  # a digit for Python, and no number
    messages = []
    assert checkpoint.find_newest_undamaged_checkpoint(tmp_path, messages.append) == tmp_path / "checkpoint-1"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-²"}
    assert messages


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.write_checkpoint(tmp_path, step, fill)
    checkpoint.delete_old_checkpoints(tmp_path, keep=2, best_steps={4})
    assert [checkpoint.parse_checkpoint_step(p) for p in checkpoint.list_checkpoints(tmp_path)] == [4, 8, 10]
    assert json.loads((tmp_path / "checkpoint-4" / "checksums.json").read_text()).keys() == checkpoint.REQUIRED_FILES
