"""LoRA-GA: A and B start so that the first step of training goes where full fine-tuning would go.

    G = the mean gradient of W over some training steps = U S Vᵀ
    "ArB2r"     A = V[:, :r]ᵀ                B = U[:, r:2r] S[r:2r]
    "A2rBr"     A = V[:, r:2r]ᵀ              B = U[:, :r] S[:r]
    "ArBr"      A = odd columns of V         B = even columns of U S
    "random"    r columns of the first 2r, the same for both

and then the scale: "stable" multiplies B by ⁴√(rows of W) / √γ, "weight_svd" by S₁(W) / S_B, "gd_scale" divides both
by s. As for PiSSA, the start is subtracted again; see `lora_init.py`.

Paper: https://arxiv.org/abs/2407.05000.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterSite
from ...core.kernels.linear_layers import is_quantized, is_weight_transposed
from ...errors import ConfigError
from ...extras.layer_inputs import load_cached_statistics, save_cached_statistics
from .corda import find_linear_targets
from .init_configs import LoraGAConfig as LoraGAConfig

_GRADIENT = "_peft_loraga_grad"
"""PEFT's name of the attribute of a layer that holds its gradient, in the shape of the stored weight."""


def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike | None = None,
) -> None:
    """Compute the gradients that `get_peft_model(model, lora_config)` with `init_lora_weights="lora_ga"` starts from.

    Args:
        model: the base, not quantized; each target layer gets the attribute `_peft_loraga_grad`.
        train_step: runs forward and backward passes of the model; the gradients of all of them are averaged.
        cache_file: safetensors file of the gradients: read if it exists, else written.
    """
    if lora_config.lora_ga_config is None:
        hint = "LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(...))"
        raise ConfigError("If you want to use LoRA-GA, the config needs a lora_ga_config", hint=hint)
    layers = find_linear_targets(model, lora_config)
    if not layers:
        message = "No supported layers found for LoRA-GA: target_modules names no Linear and no Conv1D"
        raise ConfigError(message, "at least one linear layer")
    for name, layer in layers.items():
        if is_quantized(layer) or hasattr(layer, "quant_state"):
            raise ConfigError(
                f"{name} is quantized, and LoRA-GA needs the gradients of weights", "a base in 16 or 32 bits"
            )
    gradients = load_cached_statistics(cache_file)
    if gradients is None:
        gradients = {f"{n}.{_GRADIENT}": g for n, g in _average_gradients(model, layers, train_step).items()}
        save_cached_statistics(cache_file, gradients)
    for name, layer in layers.items():
        setattr(layer, _GRADIENT, gradients[f"{name}.{_GRADIENT}"].to(layer.weight.device))


def _average_gradients(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the mean gradient of each layer's weight over the backward passes of `train_step`."""
    required = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    counts = dict.fromkeys(layers, 0)

    def count(name: str, *_: Any) -> None:
        counts[name] += 1

    model.train().requires_grad_(False)
    handles = []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        handles.append(layer.register_full_backward_hook(partial(count, name)))
    try:
        with torch.enable_grad():
            train_step()
        if missing := [n for n, layer in layers.items() if layer.weight.grad is None]:
            message = f"train_step gave the layer {missing[0]} no gradient"
            raise ConfigError(message, "forward and backward passes of the model that reach every target")
        return {n: layer.weight.grad.detach() / counts[n] for n, layer in layers.items()}
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.weight.grad = None
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        model.train(was_training)


def compute_loraga_factors_and_pop_gradient(
    loraga_config: LoraGAConfig | None, site: AdapterSite, r: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `A (r, in)` and `B (out, r)` from the gradient that `preprocess_loraga` left on the layer; removes it."""
    module: Any = site.module
    if loraga_config is None:
        raise ConfigError("lora_ga_config must be provided with init_lora_weights='lora_ga'", "a LoraGAConfig")
    gradient: Tensor | None = getattr(module, _GRADIENT, None)
    if gradient is None:
        message = f"{site.name} has no gradient, which an adapter with init_lora_weights='lora_ga' starts from"
        hint = "call preprocess_loraga(model, config, train_step) before"
        raise ConfigError(message, hint=hint)
    gradient = gradient.float().t() if is_weight_transposed(module) else gradient.float()
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    for_A, for_B = _choose_components(loraga_config.direction, r)
    A, B, S_B = V.t()[: 2 * r][for_A], U[:, : 2 * r][:, for_B], S[: 2 * r][for_B]
    if len(A) != r or B.shape[1] != r:
        message = f"r is {r} at {site.name}, whose gradient has rank {len(S)}"
        raise ConfigError(message, "a rank of at most half of that with init_lora_weights='lora_ga'")
    B = B * S_B
    if loraga_config.scale == "stable":
        # The rows of the stored weight, as in PEFT: of a Conv1D these are the inputs.
        B = B * (module.weight.shape[0] ** 0.25 / loraga_config.stable_gamma**0.5)
    elif loraga_config.scale == "weight_svd":
        largest = torch.svd_lowrank(site.weight().float(), q=r, niter=4)[1][0]
        B = B * (largest / S_B[0]) if S_B[0] > 0 else B
    elif loraga_config.scale == "gd_scale":
        A, B = A / scale, B / scale
    delattr(module, _GRADIENT)
    return A, B


def _choose_components(direction: str, r: int) -> tuple[Any, Any]:
    """Return the indices, among the first 2r components, of those that A and B start as."""
    if direction == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    return {
        "ArBr": (slice(1, None, 2), slice(0, None, 2)),
        "A2rBr": (slice(r, None), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, None)),
    }[direction]
