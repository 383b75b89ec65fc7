"""The state of a model's adapters in PEFT's form: `get_layer_status` by layer, `get_model_status` in total."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.adapters.quantized_layers import count_trainable_and_all_parameters
from .tuner_layers import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    get_fully_trained_copies,
)

TUNER_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
Irregular = Literal["irregular"]
"""In place of a value that differs from layer to layer."""


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer; dictionaries are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of a model's adapters; dictionaries are by adapter."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """Return the state of each adapted layer.

    Raises:
        TypeError: the adapter is a prompt or prefix, which belongs to no layer.
        ValueError: the model has no adapted layers.
    """
    return _get_layer_status(model, "get_layer_status")


def _get_layer_status(model: Any, caller: str) -> list[TunerLayerStatus]:
    configs = getattr(model, "peft_config", {}).values()
    if any(c.is_prompt_learning or c.is_adaption_prompt for c in configs):
        message = f"{caller}() got an invalid PeftModel instance"
        raise TypeError(f"{message}: learned prompts and prefixes have no adapted layers")
    prefix = "model." if configs else ""  # PEFT's tuner has the base as its `model`
    layers = {f"{prefix}{n}": m for n, m in model.named_modules() if isinstance(m, TUNER_LAYERS)}
    if not layers:
        raise ValueError("No adapter layers found in the model; get_peft_model(model, config) adds an adapter")
    return [_get_status(name, layer) for name, layer in layers.items()]


def _get_status(name: str, layer: Any) -> TunerLayerStatus:
    module_type = repr(layer).partition("(")[0]
    if isinstance(layer, TrainableTokensWrapper):
        name, module_type = f"{name}.token_adapter", "TrainableTokensLayer"
    elif isinstance(layer, ModulesToSaveWrapper):
        module_type = "ModulesToSaveWrapper"
    parameters: dict[str, list[nn.Parameter]] = {}
    for table in (layer.adapters, layer.trained_copies, get_fully_trained_copies(layer)):
        for adapter, module in table.items():
            parameters.setdefault(adapter, []).extend(module.parameters())
    return TunerLayerStatus(
        name=name,
        module_type=module_type,
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad={a: _merge_values(p.requires_grad for p in own) for a, own in parameters.items()},
        available_adapters=sorted(parameters),
        devices={a: sorted({p.device.type for p in own}) for a, own in parameters.items()},
        quantization_backend=getattr(layer.quantization_backend, "backend_name", None),
    )


def get_model_status(model: Any) -> TunerModelStatus:
    """Return the state of the model's adapters in total; errors are those of `get_layer_status`."""
    layers = _get_layer_status(model, "get_model_status")
    configs = getattr(model, "peft_config", {})
    first = next((configs[a] for a in getattr(model, "active_adapters", ()) if a in configs), None)
    trainable_params, total_params = count_trainable_and_all_parameters(model)
    merged = {a for layer in layers for a in layer.merged_adapters}
    partly_merged = any(merged & {*layer.available_adapters} - {*layer.merged_adapters} for layer in layers)
    adapters = sorted({a for layer in layers for a in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(model).__name__ if hasattr(model, "config") or configs else "other",
        # The class of `compat/tuner_models.py` that `model.base_model` is an instance of.
        adapter_model_type=type(first).__name__.replace("Config", "Model") if first else "None",
        peft_types={a: str(config.peft_type) for a, config in configs.items()},
        trainable_params=trainable_params,
        total_params=total_params,
        num_adapter_layers=len(layers),
        enabled=_merge_values(layer.enabled for layer in layers),
        active_adapters=_merge_values(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly_merged else sorted(merged),
        requires_grad={a: _merge_values(x.requires_grad[a] for x in layers if a in x.requires_grad) for a in adapters},
        available_adapters=adapters,
        devices={a: sorted({d for layer in layers for d in layer.devices.get(a, ())}) for a in adapters},
        quantization_backend=_merge_values(layer.quantization_backend for layer in layers),
    )


def _merge_values(values: Iterable[Any]) -> Any:
    """Return the value that all layers have, else "irregular"."""
    first, *others = list(values) or [False]
    return first if all(v == first for v in others) else "irregular"
