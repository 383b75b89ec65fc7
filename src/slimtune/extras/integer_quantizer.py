"""transformers' quantizer of GPTQ and AWQ checkpoints, made to keep the weights packed; see `packed_quantizer.py`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..core.kernels.linear_layers import is_weight_transposed
from .integer_checkpoints import read_integer_checkpoint, require_whole_layers
from .integer_weights import pack_integer_weight
from .packed_quantizer import KeepPacked, LoadedParameters, PackedQuantizerMixin
from .quantized_weight import QuantizedLinear, QuantizedWeight

PACKED_INTEGERS = "slimtune_packed_integers"
"""The quantizer's name in transformers."""


class _KeepPackedIntegers(KeepPacked):
    """Loads the packed tensors of a weight as a `QuantizedWeight`; of an expert before experts are stacked."""

    def pack(self, tensors: Any, name: str, model: Any, module: nn.Module, dtype: torch.dtype) -> LoadedParameters:
        by_layer: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, found in tensors.items():
            layer, _, leaf = pattern.rpartition(".")
            by_layer.setdefault(layer, {})[leaf] = found
        if "" not in by_layer:  # of experts, by the pattern of their names
            return {f"{layer}.weight": self.load_weights(parts, dtype) for layer, parts in by_layer.items()}
        (weight,) = self.load_weights(by_layer[""], dtype)
        if isinstance(weight, QuantizedWeight):
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                module.__class__ = QuantizedLinear
            else:
                weight = weight.dequantized().contiguous()
                weight = weight.t().contiguous() if is_weight_transposed(module) else weight
        return {name: nn.Parameter(weight, requires_grad=False)}

    def load_weights(self, parts: Mapping[str, list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
        """Return the weights of layers of one kind, packed if they are stored so."""
        if "qweight" not in parts:
            return [tensor.to(dtype) for tensor in parts["weight"]]
        stored = self.hf_quantizer.stored
        zero = stored.stores_zero_minus_one
        layers = (dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True))
        return [pack_integer_weight(t, stored.format, stores_zero_minus_one=zero, dtype=dtype) for t in layers]


@register_quantization_config(PACKED_INTEGERS)
class PackedIntegersConfig(QuantizationConfigMixin):
    """Makes transformers load a checkpoint by `PackedIntegersQuantizer`; the fields are those of config.json."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)
        self.quant_method = PACKED_INTEGERS  # type: ignore[assignment]
        self.dequantize = True  # weights are converted one by one, those of experts before they are stacked


@register_quantizer(PACKED_INTEGERS)
class PackedIntegersQuantizer(PackedQuantizerMixin, HfQuantizer):
    """transformers' quantizer of checkpoints in GPTQ and AWQ, which keeps the weights packed, and trains."""

    conversion = _KeepPackedIntegers
    serialized_names = {"weight": ["weight", "qweight", "qzeros", "scales", "g_idx"]}  # noqa: RUF012

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        settings: Any = self.quantization_config
        # From here on the model is what transformers calls quantized by the stored method.
        settings.quant_method = model.quantization_method = QuantizationMethod(settings.stored_method)
        self.stored = read_integer_checkpoint(settings.stored_method, vars(settings))
        require_whole_layers(checkpoint_files or (), self.stored)
