"""transformers' quantizer of bases in NF4, made to quantize the stacked experts of a mixture as they are loaded."""

from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from .nf4_experts import is_expert_parameter, quantize_experts_to_nf4

NF4_WITH_EXPERTS = "slimtune_nf4_with_experts"
"""The quantizer's name in transformers."""


class _QuantizeLayerOrExperts(ConversionOps):
    """Quantizes a weight as it is loaded: experts here, layers by transformers."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: Any, *args: Any, model: Any = None, **kwargs: Any) -> Any:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if is_expert_parameter(model, name):
                result[name] = nn.Parameter(quantize_experts_to_nf4(value), requires_grad=False)
            else:
                result |= Bnb4bitQuantize(self.hf_quantizer).convert({name: value}, model=model, **kwargs)
        return result


@register_quantizer(NF4_WITH_EXPERTS)
class Nf4WithExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of bases in NF4, which quantizes stacked experts, too."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        is_layer = super().param_needs_quantization(model, param_name, **kwargs)
        return is_layer or is_expert_parameter(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeLayerOrExperts(self)

    def is_serializable(self) -> bool:
        return not self.quantizes_experts  # transformers has no file format for them

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        self.quantizes_experts = any(is_expert_parameter(model, name) for name, _ in model.named_parameters())
        # From here on the model is what transformers calls quantized by bitsandbytes.
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
