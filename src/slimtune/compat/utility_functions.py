"""PEFT's small functions on models and tensors, under PEFT's names."""

import functools
from collections.abc import Callable
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

WEIGHTS_NAME = "adapter_model.bin"  # PEFT's pickles, which are refused
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
"""From how many target modules on PEFT shortens a list of names."""


init_empty_weights = accelerate.init_empty_weights
_register_parameter = nn.Module.register_parameter


def skip_init_on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: modules that the function makes have values, also inside `init_empty_weights`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        now = nn.Module.register_parameter  # what `init_empty_weights` replaces
        nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            nn.Module.register_parameter = now  # type: ignore[method-assign]

    return call


def infer_device() -> str:
    """Return the type of the device that models run on: "cuda", "mps", "xpu" or "cpu"."""
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of the module named `key`, the module itself, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Any:
    """Return the weight `(out, in)`; stored as `(in, out)` with `fan_in_fan_out`."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return what tells whether two tensors share their memory: device, address and size of the storage."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return a decoder's inputs `(rows, tokens)`: the labels one position later, -100 as padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the trained parameters to fp32 and the frozen ones to `dtype`, for mixed-precision training."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)
