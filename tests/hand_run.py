"""A run folder made by hand: a recipe, an adapter with random weights, and rows; what a training would have left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models_zoo import shake
from row_files import write_jsonl
from transformers import AutoModelForCausalLM

from slimtune.core.adapters.peft_model import get_peft_model
from slimtune.core.config import Recipe
from slimtune.core.models.loader import load_base
from slimtune.core.training.run_dir import RunDir
from slimtune.extras.training_fingerprint import TrainingFingerprint, select_forward_config_fields

TALKS = [
    ("Define hope.", "Desire and expectation rolled into one."),
    ("Define a year.", "A period of three hundred and sixty-five disappointments."),
    ("Define patience.", "A minor form of despair, disguised as a virtue."),
    ("Define bore.", "A person who talks when you wish him to listen."),
    ("Define self.", "The most important person in the universe."),
]


def write_rows(file: Path, talks: list[tuple[str, str]] = TALKS) -> Path:
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in talks]
    return write_jsonl(file, ({"messages": r} for r in rows))


def make_run(
    path: Path,
    base: Path,
    *,
    size: float = 0.2,
    change: Callable[[Any], None] = lambda model: None,
    **sections: dict[str, Any],
) -> Path:
    """Write a run folder of `base`; `size` is the standard deviation of the adapter's weights (0: it changes nothing).

    `sections` add to the recipe's: `model={"dtype": "float64"}`. `change` gets the adapted model before it is saved.
    """
    rows = write_rows(path.with_name(f"{path.name}-rows.jsonl"))
    others = write_rows(path.with_name(f"{path.name}-trained.jsonl"), [(f"Now {q}", a) for q, a in TALKS])
    recipe = Recipe.from_dict(
        {
            "model": {"name": str(base), "dtype": "float32", "device": "cpu", **sections.get("model", {})},
            "data": {"train": str(others), "test": str(rows), **sections.get("data", {})},
            "method": {"name": "lora", "rank": 4, **sections.get("method", {})},
            "train": sections.get("train", {}),
            "output_dir": str(path),
        }
    )
    run = RunDir.create(path, recipe)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fingerprint = TrainingFingerprint(config=select_forward_config_fields(base_model.config.to_dict()))
    model = get_peft_model(base_model, recipe.method_config())
    model.adapter_state.training_fingerprints["default"] = fingerprint.to_json()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draws) * size)
    change(model)
    model.save_pretrained(run.adapter)
    return path


def save_adapter_of(base: Path, folder: Path, config: Any, change: Callable[[Any], None] = shake) -> Path:
    """Write an adapter that does something, of a base that is named by its path."""
    base_model = load_base(str(base), dtype="float32", device="cpu").model
    torch.manual_seed(0)  # of A, so that what a fault changes is the same each time
    model = get_peft_model(base_model, config)
    change(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder
