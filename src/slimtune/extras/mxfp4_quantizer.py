"""transformers' quantizer of checkpoints in MXFP4, made to keep the experts packed.

transformers runs such a checkpoint with kernels that have no backward pass, or dequantizes it as it is loaded. Here
each product dequantizes some of the experts (`quantized_weight.py`), so adapters train on the checkpoint as it is.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from ..core.models.quantization import LoadOptions
from .mxfp4_experts import pack_mxfp4_experts

PACKED_MXFP4 = "slimtune_packed_mxfp4"
"""The quantizer's name in transformers."""


class _KeepPacked(ConversionOps):
    """Loads the two packed tensors of a parameter as `QuantizedWeight`."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: Any, *args: Any, model: Any = None, full_layer_name: Any = None, **kwargs: Any
    ) -> Any:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        blocks, scales = (next(t for n, t in tensors.items() if n.endswith(end)) for end in ("_blocks", "_scales"))
        module, name = get_module_from_name(model, full_layer_name)
        packed = pack_mxfp4_experts(blocks, scales, getattr(module, name).dtype)
        return {full_layer_name: nn.Parameter(packed, requires_grad=False)}


@register_quantization_config(PACKED_MXFP4)
class PackedMxfp4Config(Mxfp4Config):
    """Makes transformers load a checkpoint by `PackedMxfp4Quantizer`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "dequantize": True})
        self.quant_method = PACKED_MXFP4  # type: ignore[assignment]


@register_quantizer(PACKED_MXFP4)
class PackedMxfp4Quantizer(Mxfp4HfQuantizer):
    """transformers' quantizer of checkpoints in MXFP4, which keeps the experts packed, and trains."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Leave the experts' module as it is."""

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": _KeepPacked}

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.dequantize = False
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.MXFP4
        return super().postprocess_model(model, **kwargs)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def make_load_options(
    config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
) -> LoadOptions:
    """Return the arguments of `from_pretrained` for a base that is stored in MXFP4."""
    settings: Any = config.quantization_config
    settings["quant_method"] = PACKED_MXFP4
    return {"device_map": {"": device}}


def prevent_cpu_weight_repacking(model: nn.Module) -> None:
    """Nothing is repacked."""
