"""Full fine-tuning in bf16 against fp32 and float64, and its resumed runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import adapter, distance, recipe_of, train_until

from slimtune.core.training.optimizer import build_optimizer
from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.export.merge import merge
from slimtune.extras.stochastic_rounding import round_steps_stochastically, store_rounded_stochastically

OPTIMIZERS = ["adamw", "adamw-8bit"]


@pytest.fixture
def full_bf16(settings):
    """Settings of a full run in bf16, of four steps of six rows."""
    settings["model"]["dtype"] = "bfloat16"
    method = {"name": "full", "bf16_stochastic_round": True}
    return {**settings, "method": method, "train": {"max_steps": 4, "batch_size": 6, "learning_rate": 1e-3}}


def rounded(values: torch.Tensor) -> torch.Tensor:
    stored = torch.empty_like(values, dtype=torch.bfloat16)
    store_rounded_stochastically(values.clone(), stored)
    return stored


def test_rounding_keeps_the_expectation():
    """Each mean of 20,000 draws is within 5 standard errors of the value, which no nearest rounding would be."""
    torch.manual_seed(0)
    values = torch.tensor([1 + 1e-4, -3.0017, 1e-20, 65504.0, -0.0])[:, None]
    draws = rounded(values.expand(-1, 20_000).contiguous()).double()
    down, up = draws.amin(1), draws.amax(1)
    error = (draws.mean(1) - values[:, 0].double()).abs()
    assert (error <= 5 * (up - down) / 2 / 20_000**0.5).all()
    assert ((up - down)[:3] > 0).all()


def test_values_of_bf16_are_kept():
    values = torch.randn(999).bfloat16().float()
    special = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert rounded(values).float().equal(values)
    assert rounded(special).float().equal(special)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_small_steps_are_those_of_fp32(name):
    """Steps of 1e-4 on weights of 1, of which nearest rounding would keep none."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)

    def train_weights(dtype: torch.dtype) -> torch.Tensor:
        model = torch.nn.Linear(8192, 1, bias=False, dtype=dtype)
        torch.nn.init.ones_(model.weight)
        optimizer = round_steps_stochastically(build_optimizer(model, name, lr=1e-4))
        for _ in range(1000):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        return model.weight.detach().double()

    expected, trained = train_weights(torch.float32), train_weights(torch.bfloat16)
    assert expected.mean() == pytest.approx(0.9, abs=1e-3)
    assert trained.mean() == pytest.approx(expected.mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(full_bf16, name, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    full_bf16["train"]["optimizer"] = name
    whole = train(recipe_of({**full_bf16, "output_dir": str(tmp_path / "whole")}))
    train_until(recipe_of(full_bf16, save_steps=2), monkeypatch, 2, RuntimeError)
    resumed = train(recipe_of(full_bf16, save_steps=2), resume=True)
    assert {t.dtype for t in adapter(whole.run).values()} == {torch.bfloat16}
    assert distance(whole.run, resumed.run) == 0


def test_the_merged_model_is_what_was_trained(full_bf16, tmp_path):
    result = train(recipe_of(full_bf16))
    merge(Path(result.run), tmp_path / "merged")
    merged, trained = load_file(tmp_path / "merged/model.safetensors"), adapter(result.run)
    assert merged.keys() == {name.removeprefix("base_model.model.") for name in trained}
    assert all(trained[f"base_model.model.{name}"].equal(tensor) for name, tensor in merged.items())


def test_a_base_in_fp32_is_refused(full_bf16):
    full_bf16["model"]["dtype"] = "float32"
    with pytest.raises(UsageError, match="bf16_stochastic_round") as raised:
        train(recipe_of(full_bf16))
    assert "--dtype bfloat16" in raised.value.hint
