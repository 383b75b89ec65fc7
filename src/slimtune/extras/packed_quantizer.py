"""What transformers' quantizers have in common that keep a checkpoint's weights packed: MXFP4, GPTQ and AWQ.

transformers would run such a checkpoint with kernels that have no backward pass, or dequantize it as it is loaded. Here
each product dequantizes the weights that it multiplies by (`quantized_weight.py`), so adapters train on the checkpoint
as it is, on any device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

LoadedParameters = dict[str, nn.Parameter | list[Tensor]]
"""Parameters of the model by name; a list where transformers stacks what is loaded of several experts."""


class KeepPacked(ConversionOps):
    """Loads the packed tensors of a parameter as they are, where transformers would dequantize them."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: Any, *args: Any, model: Any = None, full_layer_name: Any = None, **kwargs: Any
    ) -> Any:  # LoadedParameters; transformers declares lists alone
        """Return the parameter, or those of several experts that transformers is about to stack, by name."""
        module, name = get_module_from_name(model, full_layer_name)
        tensors = {name: value if isinstance(value, list) else [value] for name, value in input_dict.items()}
        return self.pack(tensors, full_layer_name, model, module, getattr(module, name).dtype)

    def pack(self, tensors: Any, name: str, model: Any, module: nn.Module, dtype: torch.dtype) -> LoadedParameters:
        """Return what `convert` does.

        Args:
            tensors: those of the checkpoint by name, a list for each: several if they are of several experts.
            name: of the parameter in the model.
            model: the model.
            module: whose parameter it is.
            dtype: of the parameter.
        """
        raise NotImplementedError


class PackedQuantizerMixin:
    """Mixed into a quantizer of transformers: weights are loaded by a `KeepPacked`, and the model trains."""

    conversion: type[KeepPacked]

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": self.conversion}

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        settings: Any = self.quantization_config  # type: ignore[attr-defined]
        settings.dequantize = False
        return super().postprocess_model(model, **kwargs)  # type: ignore[misc]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
