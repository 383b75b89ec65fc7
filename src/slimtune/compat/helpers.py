"""PEFT's helpers: signatures, checks, a LoRA's scale for the length of a `with`, and the choice of targets.

KappaTune: https://github.com/oswaldoludwig/kappaTune.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..core.adapters.peft_config import PeftConfig
from ..core.kernels.linear_layers import get_dequantized_weight
from ..errors import SlimtuneError, UsageError
from .tuner_layers import LoraLayer


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


class KappaTuneSelector:
    """Finds the weights with the smallest condition numbers (largest over smallest singular value), the best targets.

    Args:
        max_dim_size_to_analyze: weights with a larger dimension are left out; the singular values take long.
        moe_param_suffixes: ends of the names of the experts' stacked weights (experts, ..., ...); None: the usual ones.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        suffixes = moe_param_suffixes or (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        experts = {n: p for n, p in model.named_parameters() if n.endswith(suffixes) and p.dim() == 3}
        linear = {n: get_dequantized_weight(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        bar = partial(tqdm, desc="Computing condition numbers", disable=not show_progress)
        fits = partial(_fits, size=max_dim_size_to_analyze)
        self.modules = {n: _condition_number(w) for n, w in bar(linear.items()) if fits(w)}
        self.parameters = {n: _condition_number(w) for n, w in bar(experts.items()) if fits(w)}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the names of linear layers, best first: this many, this fraction, or up to this condition number."""
        return _select_smallest(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the names of the experts' weights, best first, chosen as in `get_best_targets`."""
        return _select_smallest(self.parameters, top_p, num_modules, threshold)


def find_kappa_target_modules(model: nn.Module, top_p: float = 0.2, **settings: Any) -> dict[str, list[str] | None]:
    """Return `target_modules` and `target_parameters` (None without experts) of the smallest condition numbers.

    `top_p` is a fraction of the weights; `settings` are those of `KappaTuneSelector`.
    """
    found = KappaTuneSelector(model, **settings)
    parameters = found.get_best_target_parameters(top_p) or None
    return {"target_modules": found.get_best_targets(top_p), "target_parameters": parameters}


def _fits(weight: Tensor, size: int) -> bool:
    return max(weight.shape[-2:]) <= size


def _condition_number(weight: Tensor) -> float:
    """Return the condition number of a matrix, or the mean over the stacked ones."""
    values = torch.linalg.svdvals(weight.detach().float())
    return (values[..., 0] / (values[..., -1] + 1e-8)).mean().item()


def _select_smallest(
    values: dict[str, float], top_p: float | None, count: int | None, threshold: float | None
) -> list[str]:
    names = sorted(values, key=lambda n: values[n])
    if count is None and top_p is not None:
        count = max(1, int(len(names) * top_p))
    if count is None and threshold is not None:
        return [n for n in names if values[n] <= threshold]
    return names[:count]
