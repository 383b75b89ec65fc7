"""transformers' quantizer of MXFP4 checkpoints, made to keep the experts packed; see `packed_quantizer.py`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from ..core.models.quantization import LoadOptions
from .mxfp4_experts import pack_mxfp4_experts
from .packed_quantizer import KeepPacked, LoadedParameters, PackedQuantizerMixin

PACKED_MXFP4 = "slimtune_packed_mxfp4"
"""The quantizer's name in transformers."""


class _KeepPackedMxfp4(KeepPacked):
    """Loads the two packed tensors of a parameter as `QuantizedWeight`."""

    def pack(self, tensors: Any, name: str, model: Any, module: nn.Module, dtype: torch.dtype) -> LoadedParameters:
        blocks, scales = (next(t[0] for n, t in tensors.items() if n.endswith(end)) for end in ("_blocks", "_scales"))
        return {name: nn.Parameter(pack_mxfp4_experts(blocks, scales, dtype), requires_grad=False)}


@register_quantization_config(PACKED_MXFP4)
class PackedMxfp4Config(Mxfp4Config):
    """Makes transformers load a checkpoint by `PackedMxfp4Quantizer`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "dequantize": True})
        self.quant_method = PACKED_MXFP4  # type: ignore[assignment]


@register_quantizer(PACKED_MXFP4)
class PackedMxfp4Quantizer(PackedQuantizerMixin, Mxfp4HfQuantizer):
    """transformers' quantizer of checkpoints in MXFP4, which keeps the experts packed, and trains."""

    conversion = _KeepPackedMxfp4

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Leave the experts' module as it is."""

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.MXFP4
        return super().postprocess_model(model, **kwargs)


def make_load_options(
    config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
) -> LoadOptions:
    """Return the arguments of `from_pretrained` for a base that is stored in MXFP4."""
    settings: Any = config.quantization_config
    settings["quant_method"] = PACKED_MXFP4
    return {"device_map": {"": device}}


def prevent_cpu_weight_repacking(model: nn.Module) -> None:
    """Nothing is repacked."""
