"""What it means for an adapter that ships beside its base that the run held that base in 4 or 8 bits.

Served beside the base in 16 bits, the adapter stands on other weights than it was trained on: W instead of W_q. How far
its answers move is measured, and said. Merged, W_q + ΔW is what was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError
from ..setup import TrainedModel, load_run
from .verify import Trained


def require_own_base(loaded: TrainedModel, run: Path) -> None:
    """Refuse to ship a LoftQ start beside another base than its own.

    Raises:
        AdapterError: the adapter makes up for what quantization took, which a base in 16 bits still has.
    """
    recipe = loaded.recipe
    if recipe is not None and recipe.method.settings.get("init_lora_weights") == "loftq":
        raise AdapterError(
            f"the adapter of {run} started as what {recipe.model.quantization} took from the base (loftq): beside the base in "
            "16 bits that would be there twice",
            "the base and the adapter as one",
            f"slimtune merge {run} --out FOLDER, or --merged",
        )


def note(loaded: TrainedModel, run: Path, trained: Trained | None) -> list[str]:
    """Return what to know of an adapter that ships beside its base; [] where the run held the base in plain floats.

    Args:
        loaded: the adapter on its base as it was trained.
        run: where it came from.
        trained: the same as it is asked; None: nothing is measured.
    """
    quantization = loaded.base.quantization
    if quantization is None:
        return []
    merge = f"as one they are what was trained: slimtune merge {run} --out FOLDER"
    if trained is None:
        return [
            f"the adapter was trained on the base in {quantization}; beside the base in 16 bits answers differ; {merge}"
        ]
    apart, effect = _moved(run, loaded, trained), trained.effect()
    return [
        f"the adapter was trained on the base in {quantization}; beside the base in 16 bits log p differs by {apart:.2g} nats "
        f"on average, where the adapter moves it by {effect:.2g}; {merge}"
    ]


def _moved(run: Path, loaded: TrainedModel, trained: Trained) -> float:
    """Return the mean distance between the adapter on its own base and on the base that was never quantized, nats."""
    kind = str(loaded.base.dtype).removeprefix("torch.")
    plain: Any = load_run(run, dtype=kind, device="cpu", quantization="none").model
    other = Trained(plain.to(trained.engine.model.dtype), trained.engine.tokenizer, trained.texts)
    texts = trained.texts
    apart = [(trained.engine.scores(t.ids).own - other.engine.scores(t.ids).own).abs() for t in texts]
    return torch.cat(apart).mean().item()
