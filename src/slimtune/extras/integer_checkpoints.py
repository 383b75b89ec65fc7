"""Checkpoints in GPTQ and AWQ: what their config says, which ones are read, and how transformers loads them.

The weights of linear layers and of stacked experts stay packed (`integer_weights.py`), and each product dequantizes
the weight that it multiplies by; a quantized head is dequantized as it is loaded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from ..core.adapters.name_patterns import make_module_name_regex
from ..core.models.quantization import LoadOptions
from ..errors import ModelError
from .integer_weights import IntegerFormat

METHODS = ("gptq", "awq")
BITS = {"gptq": (2, 4, 8), "awq": (4,)}
PACKINGS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm", "exllama", "ipex")}
"""Names of the packings that are read, as a config says them; those of AWQ differ in their kernels alone."""
_INSTEAD = "take the base's checkpoint in 16 bits, with --quantization nf4"


@dataclass(frozen=True)
class IntegerCheckpoint:
    """How a checkpoint in GPTQ or AWQ is packed."""

    format: IntegerFormat
    group_size: int  # inputs that share a scale and a zero point; -1: all
    stores_zero_minus_one: bool  # as GPTQ's first version does
    desc_act: bool  # inputs were sorted before they were put into groups
    skipped: tuple[str, ...]  # patterns of names of layers that are not quantized, beside the head
    quantized: tuple[str, ...]  # ends of the names of the only layers that are; empty: all others

    def count_groups(self, in_features: int) -> int:
        """Return how many groups the inputs of a layer are in."""
        return 1 if self.group_size < 0 else -(-in_features // self.group_size)

    def has_layer(self, name: str) -> bool:
        """Return whether a linear layer, by name, is quantized."""
        if any(make_module_name_regex(f".*(?:{pattern}).*").matches(name) for pattern in self.skipped):
            return False
        return not self.quantized or name.endswith(self.quantized)

    def describe(self) -> str:
        """Return the method and bits: `GPTQ, 4 bits`."""
        return f"{self.format.method.upper()}, {self.format.bits} bits"


def read_integer_checkpoint(method: str, settings: Mapping[str, Any]) -> IntegerCheckpoint:
    """Return how a checkpoint is packed by what its config says; raise ModelError if it is not read.

    Args:
        method: one of `METHODS`.
        settings: `quantization_config` of config.json.
    """
    bits, group_size = settings.get("bits", settings.get("w_bit")), settings.get("group_size", 128)
    named = [settings.get(field) for field in ("checkpoint_format", "format", "version")]
    packing = next((str(name).lower() for name in named if name), PACKINGS[method][0])
    _require(method, "bits", bits, BITS[method])
    _require(method, "checkpoint_format" if method == "gptq" else "version", packing, PACKINGS[method])
    _require(method, "pack_dtype", settings.get("pack_dtype") or "int32", ("int32",))
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise _make_error(method, "group_size", group_size, "a number of inputs, or -1 for all of a layer")
    dynamic = settings.get("dynamic") or {}
    skipped = [re.escape(name) for name in settings.get("modules_to_not_convert") or ()]
    skipped += [name.removeprefix("-:") for name in dynamic if name.startswith("-:")]
    chosen = settings.get("modules_in_block_to_quantize") or ()
    return IntegerCheckpoint(
        format=IntegerFormat(method, bits),
        group_size=group_size,
        stores_zero_minus_one=packing == "gptq",
        desc_act=bool(settings.get("desc_act")),
        skipped=tuple(skipped),
        quantized=tuple(name for names in chosen for name in ([names] if isinstance(names, str) else names)),
    )


def require_whole_layers(files: Iterable[str], stored: IntegerCheckpoint) -> None:
    """Raise ModelError if a layer in a checkpoint's safetensors files lacks a tensor, or one has another shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layers = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    what, method = stored.describe(), stored.format.method
    if not layers:
        raise ModelError(
            f"the config says {what}, and no layer of the checkpoint is packed", "layers with a qweight",
            "download it again, or remove quantization_config from config.json", code="quantized-base",
        )  # fmt: skip
    for layer in layers:
        needed = ("qzeros", "scales", *(("g_idx",) if stored.desc_act else ()))
        missing = [leaf for leaf in needed if f"{layer}.{leaf}" not in shapes]
        if missing:
            why = " (the config says desc_act)" if "g_idx" in missing else ""
            raise ModelError(
                f"the layer {layer} of the checkpoint in {what} lacks {', '.join(missing)}{why}",
                f"qweight, {', '.join(needed)} of each layer", "download it again", code="quantized-base",
            )  # fmt: skip
        in_features = shapes[f"{layer}.qweight"][0] * (1 if method == "awq" else 32 // stored.format.bits)
        groups, out_features = shapes[f"{layer}.scales"]
        expected: dict[str, tuple[int, ...]] = dict(stored.format.list_shapes(in_features, out_features, groups))
        if f"{layer}.g_idx" in shapes:
            expected["g_idx"] = (in_features,)
        for leaf, shape in expected.items():
            if (found := shapes[f"{layer}.{leaf}"]) != shape:
                raise ModelError(
                    f"{layer}.{leaf} of the checkpoint has the shape {found}",
                    f"{shape}, as the config says {what}",
                    f"a checkpoint with the same bits in each layer; or {_INSTEAD}",
                    code="quantized-base",
                )


def make_load_options(
    config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
) -> LoadOptions:
    """Return the arguments of `from_pretrained`; raise ModelError if the packing is one that is not read."""
    from .integer_quantizer import PACKED_INTEGERS

    settings: Any = config.quantization_config
    read_integer_checkpoint(quantization, settings)
    settings |= {"quant_method": PACKED_INTEGERS, "stored_method": quantization}
    return {"device_map": {"": device}}


def prevent_cpu_weight_repacking(model: nn.Module) -> None:
    """Nothing is repacked."""


def _require(method: str, field: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise _make_error(method, field, value, ", ".join(map(str, known)))


def _make_error(method: str, field: str, value: Any, expected: str) -> ModelError:
    message = f"the checkpoint is stored in {method.upper()} with {field} {value!r:.80}, which is not read"
    return ModelError(message, f"{field} {expected}", _INSTEAD, code="quantized-base")
