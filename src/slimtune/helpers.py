"""PEFT's helpers: signatures, checks, and a LoRA's scale for the length of a `with`."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adapters.config import PeftConfig
from .adapters.peft_layers import LoraLayer
from .errors import SlimtuneError, UsageError
from .peft_names import make_getattr

__getattr__ = make_getattr(__name__)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Return whether a folder or a Hub repository has a valid config of an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (SlimtuneError, OSError, ValueError):
        return False
    return True


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the signature and docstring of the base's; here it already is the base's."""
    _copy_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give `model.generate` the signature and docstring of the base's."""
    if hasattr(model, "generate"):
        _copy_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Give `model.forward`, `model.generate` or both ("all") the signature and docstring of the base's."""
    if method not in ("forward", "generate", "all"):
        raise UsageError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        _copy_signature(model, name) if hasattr(model, name) else None


def _copy_signature(model: Any, name: str) -> None:
    method, original = getattr(model, name), getattr(model.base_model_class, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    setattr(model, name, call)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scales of all LoRA layers inside the `with`: 0 switches them off, 1 leaves them as they are.

    Raises:
        TypeError: multiplier is no number.
        UsageError: the model has no LoRA.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise UsageError("scaling is only supported for models with `LoraLayer`s")
    # Not the layers: a merge inside the `with` may remove their adapters.
    scales = {m: m.scale for layer in layers for m in layer.adapters.values() if "scaling" in m.peft_values}
    try:
        for module, scale in scales.items():
            module.scale = scale * multiplier
        yield
    finally:
        for module, scale in scales.items():
            module.scale = scale


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Keep PEFT's adapters from casting a layer's input to their dtype; here none does: they follow the input's."""
    yield
