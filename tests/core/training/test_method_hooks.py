"""A method that changes with the steps (AdaLoRA) in a run: steps filled in, penalty on the loss, exact resuming."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import adapter, distance, metrics, recipe_of, train_until

from slimtune.core.training import checkpoint
from slimtune.core.training.train import train
from slimtune.errors import SlimtuneError


@pytest.fixture
def adalora(settings):
    return {**settings, "method": {"name": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}}


def test_run_reaches_the_target_rank_and_resumes_bit_for_bit(adalora, tmp_path, monkeypatch):
    adalora["data"] |= {"validation": None, "validation_fraction": 0}
    whole = train(recipe_of({**adalora, "output_dir": str(tmp_path / "whole")})).run
    config = json.loads((Path(whole) / "adapter" / "adapter_config.json").read_text())
    assert config["total_step"] == 8
    ranks = {name: sum(kept) for name, kept in config["rank_pattern"].items()}
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert [len(t) for k, t in sorted(adapter(whole).items()) if k.endswith("lora_A")] == [
        rank for _, rank in sorted(ranks.items())
    ]
    folder = train_until(recipe_of(adalora), monkeypatch, 2)
    (newest,) = checkpoint.list_checkpoints(folder / "checkpoints")
    state = load_file(newest / checkpoint.METHOD_FILE)
    assert any(k.endswith(":left") and not t.all() for k, t in state.items())
    train(recipe_of(adalora), resume=True)
    assert distance(folder, whole) == 0
    resumed = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert resumed["rank_pattern"] == config["rank_pattern"]


def test_regularization_loss_counts_once_per_step(adalora, tmp_path):
    adalora["method"]["orth_reg_weight"] = 7.0
    sizes = {"one": {"batch_size": 6}, "many": {"batch_size": 2, "gradient_accumulation_steps": 3}}
    one, many = (
        metrics(train(recipe_of({**adalora, "output_dir": str(tmp_path / n)}, max_steps=4, **t)).run, "train_loss")
        for n, t in sizes.items()
    )
    assert one[0] > 7
    assert one == pytest.approx(many, rel=1e-4)


def test_other_methods_write_no_method_file(whole_run):
    newest = checkpoint.list_checkpoints(Path(whole_run.run) / "checkpoints")[-1]
    assert not (newest / checkpoint.METHOD_FILE).exists()


def test_late_config_error_leaves_no_folder(settings):
    """AdaLoRA learns how long the run is when the run is ready to start."""
    settings["method"] = {"name": "adalora", "tfinal": 100}
    with pytest.raises(SlimtuneError, match="total_step"):
        train(recipe_of(settings))
    assert not Path(settings["output_dir"]).exists()
