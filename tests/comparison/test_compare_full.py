"""Full fine-tuning: every weight trains, as plain torch would, and it goes on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimtune.comparison.full import evaluate_full, train_full
from slimtune.config import Recipe
from slimtune.errors import UsageError
from slimtune.setup import load_datasets, load_tokenizer_from_recipe
from slimtune.train_step.loss import make_collator, step_loss
from slimtune.training.trainer import SlimTrainer


@pytest.fixture
def recipe(grid, tmp_path):
    """Make the recipe of a full run: `recipe("a", dtype="bfloat16", max_steps=4)`."""

    def make(name: str, dtype: str = "float32", **train) -> Recipe:
        made = grid("full")
        section = {"learning_rate": 1e-3, "max_steps": 4, **train}
        found = made.recipe(made.entries[0], 7, tmp_path / name, **section)
        return found.model_copy(update={"model": found.model.model_copy(update={"dtype": dtype})})

    return make


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


def test_one_step_is_torchs_own(recipe):
    made = recipe("run", max_steps=1, batch_size=24, lr_scheduler="constant", warmup_ratio=0, max_grad_norm=0)
    result = train_full(made)
    tokenizer = load_tokenizer_from_recipe(made)
    model = AutoModelForCausalLM.from_pretrained(made.model.name)
    batch = make_collator(model, tokenizer.pad_token_id, packing=False)(load_datasets(made, tokenizer).train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    step_loss(model.train(), batch).backward()
    optimizer.step()
    own = dict(model.named_parameters())
    kept = weights(result["run"])
    assert kept.keys() == own.keys()
    assert all(torch.allclose(kept[n], own[n], atol=2e-5) for n in own)
    assert result["trainable_params"] == result["total_params"] == sum(p.numel() for p in own.values())


def test_it_goes_on_from_a_checkpoint_bit_for_bit(recipe, monkeypatch):
    dtype = "bfloat16"
    whole = train_full(recipe("whole", dtype))
    ends = SlimTrainer.step_ends

    def dies(self):
        ends(self)
        if self.state.global_step == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(SlimTrainer, "step_ends", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_full(recipe("killed", dtype))
    monkeypatch.setattr(SlimTrainer, "step_ends", ends)
    again = train_full(recipe("killed", dtype), resume=True)
    left, right = weights(whole["run"]), weights(again["run"])
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert next(iter(left.values())).dtype == getattr(torch, dtype)
    assert again["trained_tokens"] == whole["trained_tokens"]
    steps = [json.loads(m)["step"] for m in (Path(again["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_it_is_measured_against_its_base(recipe):
    made = recipe("run")
    train_full(made)
    found = evaluate_full(made)
    assert found["loss_reduction"] == pytest.approx(found["base_loss"] - found["tuned_loss"])
    assert found["loss_reduction"] > 0.01
    rows = json.loads((Path(made.out) / "scores-test.json").read_text())
    assert [r["line"] for r in rows] == list(range(1, 9))
    assert sum(r["tuned"] for r in rows) / sum(r["tokens"] for r in rows) == pytest.approx(found["tuned_loss"])
    assert json.loads((Path(made.out) / "eval-test.json").read_text()) == found


def test_a_quantized_base_is_refused(recipe):
    made = recipe("run")
    quantized = made.model_copy(update={"model": made.model.model_copy(update={"quantization": "nf4"})})
    with pytest.raises(UsageError, match="full fine-tuning would train weights that are kept in nf4"):
        train_full(quantized)
