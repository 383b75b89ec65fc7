"""A method that changes with the steps (AdaLoRA) in a run: steps filled in, penalty on the loss, exact resuming."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import interrupt_at, recipe_of

from slimtune.errors import SlimtuneError
from slimtune.training import checkpoint
from slimtune.training.train import Interrupted, train


@pytest.fixture
def adalora(settings):
    return {**settings, "method": {"name": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}}


def written(folder: Path) -> tuple[dict, dict]:
    adapter = folder / "adapter"
    return load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())


def test_the_run_sets_total_step_and_reaches_the_target_rank(adalora, tmp_path):
    data = {k: v for k, v in adalora["data"].items() if k != "validation"} | {"validation_fraction": 0}
    train(recipe_of({**adalora, "data": data}))
    tensors, config = written(Path(adalora["output_dir"]))
    assert config["total_step"] == 8
    left = [sum(ranks) for ranks in config["rank_pattern"].values()]
    assert sum(left) == 2 * len(left)
    assert len(set(left)) > 1
    assert [len(t) for k, t in sorted(tensors.items()) if k.endswith("lora_A")] == [
        sum(ranks) for _, ranks in sorted(config["rank_pattern"].items())
    ]


def test_an_interrupted_run_resumes_bit_for_bit(adalora, tmp_path, monkeypatch):
    train(recipe_of({**adalora, "output_dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            train(recipe_of(adalora))
    folder = Path(adalora["output_dir"])
    (newest,) = checkpoint.list_checkpoints(folder / "checkpoints")
    kept = load_file(newest / checkpoint.METHOD_FILE)
    assert any(k.endswith(":left") and not t.all() for k, t in kept.items())
    train(recipe_of(adalora), resume=True)
    (whole, config), (resumed, again) = written(tmp_path / "whole"), written(folder)
    assert config["rank_pattern"] == again["rank_pattern"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_the_regularization_loss_counts_once_per_step(adalora, tmp_path):
    """However many micro-batches a step has."""
    method = {**adalora["method"], "orth_reg_weight": 7.0}
    plain = {**adalora, "method": method}
    for name, train_settings in {
        "one": {"batch_size": 6},
        "many": {"batch_size": 2, "gradient_accumulation_steps": 3},
    }.items():
        train(recipe_of({**plain, "output_dir": str(tmp_path / name)}, max_steps=4, logging_steps=1, **train_settings))
    lines = [line for n in ("one", "many") for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
    losses = [m["train_loss"] for line in lines if "train_loss" in (m := json.loads(line))]
    assert len(losses) == 8
    assert losses[0] > 7
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)


def test_other_methods_write_no_file(settings):
    train(recipe_of(settings, max_steps=2))
    newest = checkpoint.list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1]
    assert not (newest / checkpoint.METHOD_FILE).exists()


def test_a_late_config_error_leaves_no_folder(settings):
    """AdaLoRA learns how long the run is when the run is ready to start."""
    late = {**settings, "method": {"name": "adalora", "tfinal": 100}}
    with pytest.raises(SlimtuneError, match="total_step"):
        train(recipe_of(late))
    assert not Path(settings["output_dir"]).exists()
