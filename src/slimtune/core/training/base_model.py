"""The base of a run: loaded as the recipe's `model` section says, with a head for classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelError, format_names
from ..config.schema import ModelSettings
from ..data.class_labels import ClassLabels
from ..foundation.device import disable_malloc_trim
from ..models.lm_head import get_classifier_head
from ..models.loader import LoadedBase, load_base, load_tokenizer
from .nonfinite import find_nonfinite_weights

LoadBase = Callable[[ModelSettings, Path | None, ClassLabels | None], LoadedBase]
"""Loads a base with its settings, a chat template in place of its own, and a head for classes: `load_base_model`."""


def load_base_model(model: ModelSettings, chat_template: Path | None, class_labels: ClassLabels | None) -> LoadedBase:
    """Load a base and its tokenizer, with a head for `class_labels`."""
    base = load_base(
        model.name,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        chat_template=chat_template,
        quantization=model.quantization,
        task="CAUSAL_LM" if class_labels is None else "SEQ_CLS",
        head=None if class_labels is None else class_labels.config,
    )
    if class_labels is not None:
        _require_row_head(base.model)
    if base.device.type == "cpu":
        disable_malloc_trim()
    return base


def load_base_tokenizer(model: ModelSettings, chat_template: Path | None) -> Any:
    """Load the tokenizer of a base, no weights."""
    return load_tokenizer(
        model.name, trust_remote_code=model.trust_remote_code, revision=model.revision, chat_template=chat_template
    )


def _require_row_head(model: Any) -> None:
    """Raise ModelError if a sequence classifier does not read its logits with one linear layer `score`."""
    if not isinstance(get_classifier_head(model), torch.nn.Linear):
        raise ModelError(
            f"a {type(model).__name__} has no linear head `score` on its last token",
            "a decoder with transformers' head for classification",
        )


def require_finite_weights(base: LoadedBase) -> None:
    """Raise ModelError if a weight of the base contains NaN or Inf."""
    if names := find_nonfinite_weights(base.model):
        raise ModelError(
            f"{base.source.name} is damaged: {len(names)} of its weights contain NaN or Inf: {format_names(names, 4)}",
            "finite weights",
            "download it again, or --force to train on it anyway",
        )
