"""PEFT's tables: config, tuner and prefix of a method by its PeftType; default targets by a model's `model_type`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_files import WEIGHTS_FILE as SAFETENSORS_WEIGHTS_NAME
from ..core.adapters.method_registry import METHODS, get_method_config_class
from ..core.adapters.peft_config import CONFIG_FILE as CONFIG_NAME
from ..core.adapters.peft_config import PeftType, get_peft_config
from ..core.adapters.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..errors import format_names, suggest
from ..methods.ia3.ia3_config import SCALED
from . import tuner_layers as peft_layers
from . import tuner_models as tuner
from .public_names import format_targets_name, map_peft_class_prefixes_by_method
from .tuner_models import inject_adapter_in_model

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "get_peft_config",
    "inject_adapter_in_model",
]
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = {kind: get_method_config_class(kind) for kind in PeftType}
"""Config class by method; also found by the plain string."""
_TUNERS = [c for c in vars(tuner).values() if getattr(c, "method", "") in METHODS.built_in_names()]
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, Any] = {PeftType(c.method.upper()): c for c in _TUNERS}
"""Class of `peft_model.base_model` by method."""
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING
"""The methods that a PeftMixedModel mixes: all that change layers."""
PEFT_TYPE_TO_PREFIX_MAPPING = {k: c.prefix for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if c.prefix}
"""How the names of a method's tensors start."""


def _get_default_targets(method: str) -> dict[str, list[str]]:
    targets = getattr(get_method_config_class(method), "architecture_targets", {})
    return {name: list(modules) for name, modules in targets.items() if name is not None}


TARGETS = {
    format_targets_name(m): targets for m in map_peft_class_prefixes_by_method() if (targets := _get_default_targets(m))
}
"""Default targets of each method by `model_type`: `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`, …"""
globals().update(TARGETS)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {k: list(names) for k, (_, names) in SCALED.items()}
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[..., Any]] = {}
"""Architectures that need another layout of a prefix: none, since transformers 5 gives all caches one layout."""


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return a prefix in the layout of BLOOM's cache before transformers 5: keys `(rows · heads, size, n)` by layer."""
    keys, values = torch.cat(past_key_values).chunk(2)
    flat = [
        (k.transpose(2, 3).flatten(0, 1), v.flatten(0, 1)) for k, v in zip(keys[:, None], values[:, None], strict=True)
    ]
    return tuple(flat)


def find_peft_layer_class(method: str, name: str) -> Any:
    """Return the class of a method's layers of one type, such as `find_peft_layer_class("lora", "Linear")`.

    Raises:
        AttributeError: the method has no layers of its own.
    """
    classes = {c.methods[0]: c for c in vars(peft_layers).values() if len(getattr(c, "methods", ())) == 1}
    classes["lora"] = peft_layers.LoraLayer
    if method not in classes:
        raise AttributeError(f"{method} has no {name}{suggest(method, classes)}; {format_names(classes)} have layers")
    # 4-bit and 8-bit layers of bitsandbytes are linear layers, too.
    base = nn.Linear if name.startswith("Linear") else getattr(nn, name)
    return peft_layers.get_peft_layer_class(classes[method], base)
