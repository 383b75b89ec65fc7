"""Ways to keep less of a step in memory with the same gradients, and compilation of the layers.

    recomputing                keep of norms and gated MLPs what the rest cannot be computed from in no time
                               (core/kernels/: `rms_norm.py`, `recompute.py`); on unless one of the next three is
    activation checkpointing   keep each layer's input; run the layer again in the backward pass
    offloading                 keep those inputs in CPU memory meanwhile (`core/kernels/activation_offload.py`)
    tiling                     run norms and feed-forwards a few tokens at a time (`core/kernels/recompute.py`)
    FSDP2                      shard the frozen base over the processes of a run

With the first three a row takes on the device what one layer's attention takes, and a few hidden states.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ...errors import UsageError, format_names
from ..adapters.adapter_module import AdapterModule
from ..adapters.architectures import FEED_FORWARD
from ..kernels.activation_offload import ActivationOffload
from ..kernels.linear_layers import get_base_layer_type
from ..kernels.lora_linear import needs_unfused_operations
from ..kernels.recompute import gated_linear_recomputing_product, run_in_token_tiles
from ..kernels.rms_norm import rms_norm


def apply_memory_savings(
    model: Any, checkpointing: bool = False, offload: bool = False, tile: int | None = None
) -> None:
    """Turn on checkpointing, with offloading, and tiles of `tile` tokens in an adapted model, in place."""
    if getattr(model, "use_kernels", False):
        model.reset_kernels()  # else each `train()` and `eval()` of transformers removes what is set here
    if not checkpointing and tile is None:
        _recompute_elementwise(model)
    if checkpointing:
        enable_activation_checkpointing(model, offload=offload)
    if tile is not None:
        enable_tiled_mlp(model, tile)


def enable_activation_checkpointing(model: Any, *, offload: bool = False) -> None:
    """Keep only the input of each layer for the backward pass, in CPU memory if `offload`; raise if unsupported."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        message = f"a {type(model).__name__} does not support activation checkpointing"
        raise UsageError(message, hint="turn the checkpointing off")
    # transformers 5.2x renamed it: the old name warns there, earlier releases lack the new one.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    # This makes the inputs a leaf that exists for the whole step; only reentrant checkpoints need it.
    model.disable_input_require_grads()
    if not offload:
        return
    storage = ActivationOffload()

    def checkpoint_offloaded(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
        # Hidden states are a layer's first argument; all layers share the others.
        with storage.offload_first():
            return checkpoint(run, *args)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(checkpoint_offloaded, module._gradient_checkpointing_func)


def _recompute_elementwise(model: Any) -> None:
    """Keep less for the backward pass in norms and MLPs that compute what Llama's do, in place."""
    for module in model.modules():
        # An activation with parameters would get no gradients for them.
        if has_same_forward_code(module, LlamaMLP) and not list(module.act_fn.parameters()):
            module.forward = partial(_forward_gated, module)
        elif has_same_forward_code(module, LlamaRMSNorm):
            module.forward = partial(_forward_norm, module)


def has_same_forward_code(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Return whether a module's forward has the code of that of another class: most families copy Llama's."""
    own, code = getattr(type(module).forward, "__code__", None), expected.forward.__code__
    if own is None or "forward" in vars(module):
        return False
    return (own.co_code, own.co_names, own.co_consts) == (code.co_code, code.co_names, code.co_consts)


def _forward_gated(module: Any, x: Tensor) -> Tensor:
    if needs_unfused_operations(x) or not torch.is_grad_enabled():
        return type(module).forward(module, x)
    return gated_linear_recomputing_product(module.act_fn, module.gate_proj(x), module.up_proj(x), module.down_proj)


def _forward_norm(module: Any, x: Tensor) -> Tensor:
    plain = x.element_size() != 2 or module.weight.requires_grad or not torch.is_grad_enabled()
    if plain or needs_unfused_operations(x):
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)


def enable_tiled_mlp(model: Any, tile_size: int) -> int:
    """Run the norms and feed-forwards of an adapted model `tile_size` tokens at a time, in place; return their number.

    Longer rows then keep the intermediate activations of only so many tokens. Dropout inside draws other numbers than
    without tiles.
    """
    if any(getattr(m, "takes_tokens", False) for m in model.modules()):
        message = "an activated LoRA needs whole rows, and tiles run a few tokens at a time"
        raise UsageError(message, hint="--set train.mlp_tile_size=null")
    modules: list[Any] = []
    for layer in _get_transformer_layers(model, "turn the tiles off"):
        found = {n: m for n, m in layer.named_modules() if n in FEED_FORWARD or get_base_layer_type(m) == "norm"}
        modules += [m for n, m in found.items() if not any(n.startswith(f"{outer}.") for outer in found)]
    # The norm after the last layer.
    modules += [m for m in model.modules() if get_base_layer_type(m) == "norm" and m not in set(modules)]
    for module in modules:
        module.forward = partial(_forward_tiled, module, tile_size, vars(module).get("forward"))
    return len(modules)


def _forward_tiled(
    module: Any, tokens: int, replaced: Callable[..., Any] | None, x: Any, *args: Any, **kwargs: Any
) -> Any:
    """Replacement forward that processes the tokens in chunks; runs the original if it is called with extra inputs."""
    run = replaced or partial(type(module).forward, module)
    if args or kwargs or not isinstance(x, Tensor) or x.dim() < 3:
        return run(x, *args, **kwargs)
    shared = [s for m in module.modules() if isinstance(m, AdapterModule) for s in m.shared]
    trained = dict.fromkeys(p for m in (module, *shared) for p in m.parameters() if p.requires_grad)
    return run_in_token_tiles(run, x, max(1, tokens // x.shape[0]), list(trained))


def shard_base_with_fsdp(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard an adapted model's base over the processes, in place, and move the whole adapter to `device`.

    Each process keeps 1/N. FSDP2 gets one group per layer and one for the rest (embeddings, last norm, head); each is
    gathered before its forward and backward passes. The adapter stays whole in every process, and
    `core/foundation/distributed.py` sums its gradients: it is saved, clipped and resumed as in one process. A fused
    function keeps the gathered weight for its backward pass: FSDP2 frees that tensor's storage after the layer's
    forward pass and fills it again before its backward pass. A model in CPU memory is moved layer by layer.
    """
    layers = _get_transformer_layers(model, "--set train.fsdp=false")
    # The adapter's parameters, trained or fixed, and the base's parameters that it has trained copies of.
    unsharded = {p for p in model.parameters() if p.requires_grad}
    for layer in model.adapted_layers().values():
        unsharded |= {p for part in (layer.adapters, layer.trained_copies) for p in part.parameters()}
        if layer.trained_copies:
            unsharded |= {p for p in layer._parameters.values() if p is not None}
    frozen = [(n, p) for n, p in model.named_parameters() if p not in unsharded]
    quantized = [n for n, p in frozen if hasattr(p, "packed") or not p.is_floating_point()]
    if quantized:
        raise UsageError(
            f"train.fsdp: {len(quantized)} weights are quantized, such as {format_names(quantized, 2)}",
            "a base in 16 or 32 bits: quantized weights cannot be cut by rows",
            "--set train.fsdp=false, where each process keeps the whole quantized base",
        )
    for parameter in unsharded:
        parameter.data = parameter.data.to(device)
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=unsharded)


def compile_and_count_layers(model: Any) -> int:
    """Compile each layer of the backbone with torch.compile, in place; return how many.

    The first steps then take minutes. Attention by segment is not compiled, since it changes with each micro-batch.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        message = "torch.compile needs a C++ compiler on a CPU, and there is none"
        raise UsageError(message, "g++ or clang++", "leave out --compile")
    layers = _get_transformer_layers(model, "leave out --compile")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _get_transformer_layers(model: Any, hint: str) -> list[nn.Module]:
    """Return the layers of a transformers model; raise UsageError with the hint if it has none."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        message = f"a {type(model).__name__} has no layers of transformers' GradientCheckpointingLayer"
        raise UsageError(message, hint=hint)
    return layers
