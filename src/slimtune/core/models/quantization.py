"""In which quantization a checkpoint is stored or loaded, and how a quantized base becomes a plain one."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...errors import ModelError, UsageError, format_install_command, format_names, suggest
from ..foundation.registry import Registry
from ..kernels.linear_layers import (
    dequantizes_itself,
    get_base_layer_type,
    get_dequantized_weight,
    get_in_and_out_features,
    is_quantized,
)

KINDS = ("nf4", "int8")
"""Quantizations in which a base can be loaded."""
LoadOptions = dict[str, Any]
"""Arguments of transformers' `from_pretrained`, which takes any that a quantization library has."""


class QuantizedBaseLoader(Protocol):
    """How the library that quantizes a base loads it."""

    def make_load_options(
        self, config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
    ) -> LoadOptions:
        """Return the arguments of `from_pretrained`; `is_stored`: the checkpoint is quantized already.

        Writes into `config` the dtype in which a stored checkpoint computes. Raises UsageError for a dtype in which it
        cannot compute, ModelError if the library is missing.
        """

    def prevent_cpu_weight_repacking(self, model: nn.Module) -> None:
        """Keep the library from repacking weights on a CPU where that would be wrong or fail."""


BASE_QUANTIZATIONS: Registry[QuantizedBaseLoader] = Registry("slimtune.base_quantizations", "quantization of bases")


def require_bitsandbytes_installed(feature: str) -> None:
    """Raise ModelError if bitsandbytes, which `feature` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        message = f"{feature} needs the package bitsandbytes, which is not installed"
        raise ModelError(
            message, "bitsandbytes 0.48 or newer", format_install_command("quant"), code="bitsandbytes-missing"
        )


def get_stored_quantization(config: PreTrainedConfig) -> str | None:
    """Return a checkpoint's quantization: "nf4", "fp4", "int8" or the name of another method; None if it has none."""
    settings = get_quantization_settings(config)
    if not settings or settings.get("load_in_8bit"):
        return "int8" if settings else None
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))  # the enum of transformers, or the text of a config.json


def resolve_quantization_and_load_args(
    config: PreTrainedConfig, quantization: str | None, dtype: torch.dtype, device: torch.device, base_name: str
) -> tuple[str | None, dict[str, Any]]:
    """Return the quantization a base will have, and the arguments of `from_pretrained` for it.

    A checkpoint that is quantized is loaded as it is stored, but computes in `dtype`, which may be written into
    `config`. What no part of `BASE_QUANTIZATIONS` takes is left to transformers.

    Args:
        config: the base's config.
        quantization: "nf4", "int8", or None: as the checkpoint is stored.
        dtype: of what is not quantized, and of every product.
        device: where the base is loaded to.
        base_name: name of the base, for messages.
    """
    stored = get_stored_quantization(config)
    if quantization not in (None, stored, *KINDS):
        raise UsageError(
            f"quantization is {quantization!r}{suggest(str(quantization), KINDS)}", f"{format_names(KINDS)}, or nothing"
        )
    if stored is not None and quantization not in (None, stored):
        raise UsageError(
            f"the checkpoint {base_name!r} is stored in {stored}, and {quantization} was asked for",
            f"{stored}, or nothing: a quantized checkpoint is loaded as it is",
            "leave out --quantization, or take the base's checkpoint in 16 or 32 bits",
        )
    used = stored or quantization
    if used is None or used not in BASE_QUANTIZATIONS.names():
        return used, {}
    return used, BASE_QUANTIZATIONS.load(used).make_load_options(config, used, stored is not None, dtype, device)


def dequantize_model(model: Any, dtype: torch.dtype) -> Any:
    """Replace the quantized layers of a base without adapters by plain ones in `dtype`, in place; return the base."""
    for name, module in list(model.named_modules()):
        if get_base_layer_type(module) != "linear" or not is_quantized(module):
            for leaf, parameter in module._parameters.items():
                if dequantizes_itself(parameter):
                    module._parameters[leaf] = nn.Parameter(parameter.dequantized().to(dtype), requires_grad=False)
            continue
        plain = nn.Linear(*get_in_and_out_features(module), bias=False, device="meta")
        plain.weight = nn.Parameter(get_dequantized_weight(module).to(dtype), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain.train(module.training))
    remove_quantization_config(model)
    return model


def remove_quantization_config(model: Any) -> None:
    """Remove what transformers noted about a base's quantization; its layers stay as they are."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)


def get_quantization_settings(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return what a base's config says about how its checkpoint is quantized; {}: nothing."""
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, Mapping) else settings.to_dict()
