"""CorDA: A and B start as the parts of the weight that the inputs of some data use most, or least.

    C = Σ x xᵀ over the inputs x of a layer, averaged over the calls, + λ I
    W C = U S Vᵀ                  s · B A = U_k S_k V_kᵀ C⁻¹ for r of the components k

"ipm" takes the r largest components, which learn the task of the data fastest; "kpm" takes the r smallest and so keeps
what the data show that the model knows. λ grows until C can be inverted. As for PiSSA, the start is subtracted again;
see `lora_init.py`.

Paper: https://arxiv.org/abs/2406.05223.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterSite
from ...core.adapters.targets import map_target_modules_by_name
from ...core.kernels.linear_layers import get_base_layer_type, get_dequantized_weight
from ...errors import ConfigError
from ...extras.layer_inputs import load_cached_statistics, recording_layer_inputs, save_cached_statistics
from .init_configs import CordaConfig as CordaConfig

_DAMPING, _LARGEST_ERROR = 0.01, 0.05


@dataclass
class _CordaEigens:
    """The components of one layer that its adapter starts as: `S_WC (r)`, `U_WC (out, r)`, `V_WC (in, r)`."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Compute what `get_peft_model(model, lora_config)` with `init_lora_weights="corda"` starts from.

    Args:
        model: the base; each target layer gets the attribute `eigens`.
        run_model: runs the model on the data; not needed if `lora_config.corda_config` names a file that exists.
        hooked_model: the model that `run_model` runs, if it is a copy of `model`.
    """
    settings: CordaConfig = lora_config.corda_config
    layers = find_linear_targets(model, lora_config)
    cached = load_cached_statistics(settings.cache_file)
    if cached is not None:
        for name, layer in layers.items():
            parts = {part: cached[f"{name}.eigens.{part}"] for part in ("S_WC", "U_WC", "V_WC")}
            layer.eigens = _CordaEigens(
                **{part: t.to(get_dequantized_weight(layer).device) for part, t in parts.items()}
            )
        return
    covariances = load_cached_statistics(settings.covariance_file)
    if covariances is None:
        if run_model is None:
            raise ConfigError("preprocess_corda has no run_model, and no file of corda_config exists", "one of them")
        hooked = layers if hooked_model is None else find_linear_targets(hooked_model, lora_config)
        dtype = None if settings.use_float16_for_covariance else torch.float32
        sums, counts = _sum_covariances({n: hooked[n] for n in layers if n in hooked}, run_model, dtype)
        covariances = {n: total / counts[n] for n, total in sums.items()}
        if not settings.prune_temporary_fields:
            for name, layer in layers.items():
                layer.sample_count, layer.covariance_matrix = counts[name], covariances[name]
        save_cached_statistics(settings.covariance_file, covariances)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if settings.verbose:
            print(f"CorDA: decomposing {name}")
        r = lora_config.get_rank(name)
        covariance = covariances[name].to(get_dequantized_weight(layer).device)
        S, U, V = _decompose(get_dequantized_weight(layer).detach().float(), covariance.float())
        kept = slice(None, r) if settings.corda_method == "ipm" else slice(-r, None)
        layer.eigens = _CordaEigens(S[kept].clone(), U[:, kept].clone(), V[:, kept].clone())
        found |= {f"{name}.eigens.{part}": tensor for part, tensor in vars(layer.eigens).items()}
    save_cached_statistics(settings.cache_file, found)


def _sum_covariances(
    layers: dict[str, Any], run_model: Callable[[], Any], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return by layer the sum of `xᵀ x (in, in)` over its calls, x scaled by its maximum, and the number of calls."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def receive(name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).to(dtype)
        x = x / x.max().abs()
        if not torch.isfinite(x).all():
            raise ConfigError(
                f"an input of {name} contains NaN or Inf, or no positive number", "data that the base knows"
            )
        sums[name] = sums.get(name, 0) + x.t() @ x
        counts[name] += 1

    with recording_layer_inputs(layers, receive):
        run_model()
    if missing := [n for n in layers if n not in sums]:
        raise ConfigError(f"run_model did not run the layer {missing[0]}", "a call of the model that runs every target")
    return sums, counts


def _decompose(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `S`, `U (out, k)` and `V (in, k)` with `U S Vᵀ = W (out, in)`, the components of `W C` in order."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damping = _DAMPING
    while True:
        damped = covariance + identity * (covariance.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < _LARGEST_ERROR:
            break
        damping *= 2
    U, S, Vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return S, U, (Vh @ inverse).t()


def pop_corda_a_and_b(site: AdapterSite, expected_rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `A (r, in)` and `B (out, r)` from what `preprocess_corda` left on the layer, which is removed."""
    module: Any = site.module
    eigens: _CordaEigens | None = getattr(module, "eigens", None)
    if eigens is None:
        message = f"{site.name} has no `eigens`, which an adapter with init_lora_weights='corda' starts from"
        raise ConfigError(message, hint="call preprocess_corda(model, config, run_model) before")
    shapes = tuple(eigens.U_WC.shape), tuple(eigens.V_WC.shape)
    if shapes != ((site.out_features, expected_rank), (site.in_features, expected_rank)):
        message = f"{site.name} has rank {expected_rank}, and its `eigens` are {shapes[0]} and {shapes[1]}"
        raise ConfigError(message, "preprocess_corda with the config and the base of the adapter")
    root = (eigens.S_WC / scale).sqrt()
    del module.eigens
    return root[:, None] * eigens.V_WC.t(), eigens.U_WC * root


def find_linear_targets(model: nn.Module, config: Any) -> dict[str, Any]:
    """Return the linear layers among the targets of a config by name; targets of other kinds are left out."""
    return {n: m for n, m in map_target_modules_by_name(model, config).items() if get_base_layer_type(m) == "linear"}
