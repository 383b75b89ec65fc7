"""A base held in 4 or 8 bits by bitsandbytes, and what a checkpoint says of the bits it is stored in.

    nf4    4 bits a value, a scale for every 64 of them, the scales in 8 bits (double quantization): 4.13 bits
    int8   8 bits a value, a scale for every row

Linear layers alone are held so: the head, what is tied to it, embeddings and norms stay in the base's dtype, and every
layer computes in it.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from ..errors import ModelError, UsageError, format_names, nearest
from ..utils.linear_layers import get_weight, is_quantized, layer_kind, layer_sizes

KINDS = ("nf4", "int8")
"""What a base can be loaded in."""
STORED = (*KINDS, "fp4")
"""What a checkpoint of bitsandbytes can be stored in."""
_ROWS = 32
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def require_bitsandbytes(what: str) -> None:
    """Raise ModelError where bitsandbytes is not installed; `what` needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{what} needs the package bitsandbytes, which is not installed",
            "bitsandbytes 0.48 or newer",
            "pip install 'slimtune[quant]'",
        )


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """Return what a checkpoint is stored in: "nf4", "fp4", "int8", or the name of another library's way.

    None: its weights are plain floats.
    """
    facts = _facts(config)
    if not facts:
        return None
    if facts.get("load_in_4bit"):
        return str(facts.get("bnb_4bit_quant_type", "fp4"))
    method = facts.get("quant_method")
    # The enum of transformers, or the text of a config.json.
    return "int8" if facts.get("load_in_8bit") else str(getattr(method, "value", method))


def has_double_quantization(config: PreTrainedConfig) -> bool:
    """Return whether the scales of a checkpoint in 4 bits are quantized, too."""
    return bool(_facts(config).get("bnb_4bit_use_double_quant"))


def quantization_config(
    config: PreTrainedConfig, kind: str | None, dtype: torch.dtype, device: torch.device, spec: str
) -> tuple[str | None, dict[str, Any]]:
    """Return what a base will be held in (None: plain floats) and what `from_pretrained` is told of that.

    A checkpoint that bitsandbytes quantized is taken as it is stored, but computes in `dtype`: that is written into
    its config. Another library's is left to transformers.

    Args:
        config: the base's.
        kind: "nf4", "int8", or None: as the checkpoint is stored.
        dtype: of what is not quantized, and of every product.
        device: where it goes.
        spec: what messages call the base.

    Raises:
        UsageError: an unknown kind, one the checkpoint contradicts, or a dtype that the kernels do not have.
        ModelError: bitsandbytes is not installed.
    """
    stored = stored_quantization(config)
    if kind not in (None, stored, *KINDS):
        raise UsageError(f"quantization is {kind!r}{nearest(str(kind), KINDS)}", f"{format_names(KINDS)}, or nothing")
    if stored is not None and kind not in (None, stored):
        raise UsageError(
            f"the checkpoint {spec!r} is stored in {stored}, and {kind} was asked for",
            f"{stored}, or nothing: a quantized checkpoint is loaded as it is",
            "leave out --quantization, or take the base's checkpoint in 16 or 32 bits",
        )
    held = stored or kind
    if held is None or held not in STORED:
        return held, {}
    if dtype not in _COMPUTED:
        names = [str(d).removeprefix("torch.") for d in _COMPUTED]
        raise UsageError(f"a base in {held} cannot compute in {str(dtype).removeprefix('torch.')}", format_names(names))
    require_bitsandbytes(f"a base in {held}")
    told: dict[str, Any] = {"device_map": {"": device}}
    if stored is None:
        told["quantization_config"] = _settings(held, dtype)
    elif held != "int8":
        own: Any = config.quantization_config
        own["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return held, told


def keep_layout(model: nn.Module) -> None:
    """Keep the layout of 4-bit weights where bitsandbytes' other layout would be wrong or could not be made.

    On CPUs with AVX-512 BF16, bitsandbytes changes the layout of a layer's weight for a faster kernel when the layer
    first runs in evaluation mode. That rounds to bf16 whatever the layer computes in, and fails if a row is not a whole
    number of blocks or the number of rows is not a multiple of 32.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            block = layer.weight.quant_state.blocksize
            whole = layer.in_features % block == 0 and layer.out_features % _ROWS == 0
            layer.support_avx512bf16_for_cpu = whole and layer.compute_dtype == torch.bfloat16


def dequantize_model(model: Any, dtype: torch.dtype) -> Any:
    """Make a quantized base an ordinary one, in place: every layer with the values it multiplies by; return it.

    Args:
        model: without adapters.
        dtype: of what is unpacked; the rest stays as it is.
    """
    for name, module in list(model.named_modules()):
        if layer_kind(module) != "linear" or not is_quantized(module):
            continue
        into, out = layer_sizes(module)
        with torch.device("meta"):
            plain = nn.Linear(into, out, bias=False)
        plain.weight = nn.Parameter(get_weight(module).to(dtype), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain.train(module.training))
    remove_quantization(model)
    return model


def remove_quantization(model: Any) -> None:
    """Take from a model what transformers noted of its quantization; its modules stay as they are."""
    model._weight_conversions = None  # the quantizer's, which has no way back
    for owner, names in (
        (model.config, ("quantization_config",)),
        (model, ("is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def _facts(config: PreTrainedConfig) -> Mapping[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, Mapping) else found.to_dict()


def _settings(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
