"""Ways to keep less of a step in memory with the same gradients, and compilation of the layers.

    activation checkpointing   keep each layer's input; run the layer again in the backward pass
    offloading                 keep those inputs in CPU memory meanwhile (`kernels/activation_offload.py`)
    tiling                     run norms and feed-forwards a few tokens at a time, forward and backward
                               (`kernels/tiled_mlp.py`)

With all three a row takes on the device what one layer's attention takes, and a few hidden states.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.architectures import FEED_FORWARD
from ..errors import UsageError
from ..kernels.activation_offload import ActivationOffload
from ..kernels.tiled_mlp import run_tiled
from ..utils.linear_layers import layer_kind


def apply_memory_savings(model: Any, checkpointing: bool, offload: bool, tile: int | None) -> None:
    """Turn on what a recipe's `train` section asks for, in place.

    Args:
        model: the model, adapted before.
        checkpointing: activation checkpointing.
        offload: with checkpointing, keep the inputs in CPU memory.
        tile: tokens that norms and feed-forwards run at a time; None: all.
    """
    if checkpointing:
        enable_activation_checkpointing(model, offload=offload)
    if tile is not None:
        enable_tiled_mlp(model, tile)


def enable_activation_checkpointing(model: Any, *, offload: bool = False) -> None:
    """Keep only the input of each layer for the backward pass, in place.

    Args:
        model: a transformers model, adapted or not.
        offload: keep the inputs in CPU memory.

    Raises:
        UsageError: the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"a {type(model).__name__} does not support activation checkpointing", hint="turn the checkpointing off"
        )
    # transformers 5.2x renamed it: the old name warns there, earlier releases lack the new one.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    # This makes the inputs a leaf that exists for the whole step; only reentrant checkpoints need it.
    model.disable_input_require_grads()
    if offload:
        storage = ActivationOffload()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                checkpoint = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = partial(_checkpoint_offloaded, storage, checkpoint)


def _checkpoint_offloaded(
    storage: ActivationOffload, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any
) -> Any:
    # Hidden states are a layer's first argument; all layers share the others.
    with storage.offload_first():
        return checkpoint(run, *args)


def enable_tiled_mlp(model: Any, tokens: int) -> int:
    """Run the norms and feed-forwards of a model's layers `tokens` tokens at a time, in place.

    Longer rows then keep the intermediate activations of only so many tokens. Dropout inside draws other numbers than
    without tiles.

    Args:
        model: a transformers model, adapted before.
        tokens: of each row, from 1.

    Returns:
        The number of modules that are tiled.

    Raises:
        UsageError: the model has no transformer layers.
    """
    modules = [m for layer in transformer_layers(model, "turn the tiles off") for m in _token_wise_modules(layer)]
    # The norm after the last layer.
    modules += [m for m in model.modules() if layer_kind(m) == "norm" and m not in set(modules)]
    for module in modules:
        module.forward = partial(_forward_tiled, module, tokens, vars(module).get("forward"))
    return len(modules)


def _token_wise_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of a layer that compute each token by itself."""
    found = {n: m for n, m in layer.named_modules() if n in FEED_FORWARD or layer_kind(m) == "norm"}
    return [m for n, m in found.items() if not any(n.startswith(f"{outer}.") for outer in found)]


def _forward_tiled(
    module: Any, tokens: int, replaced: Callable[..., Any] | None, x: Any, *args: Any, **kwargs: Any
) -> Any:
    """Replacement forward that processes the tokens in chunks; runs the original if it is called with extra inputs."""
    run = replaced or partial(type(module).forward, module)
    if args or kwargs or not isinstance(x, Tensor) or x.dim() < 3:
        return run(x, *args, **kwargs)
    trained = [p for p in module.parameters() if p.requires_grad]
    return run_tiled(run, x, max(1, tokens // x.shape[0]), trained)


def compile_layers(model: Any) -> int:
    """Compile each layer of the backbone with torch.compile, in place; return how many.

    The first steps then take minutes. Attention by segment is not compiled, since it changes with each micro-batch.

    Raises:
        UsageError: there is no compiler, or the model has no transformer layers.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UsageError(
            "torch.compile needs a C++ compiler on a CPU, and there is none", "g++ or clang++", "leave out --compile"
        )
    layers = transformer_layers(model, "leave out --compile")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def transformer_layers(model: Any, hint: str) -> list[nn.Module]:
    """Return the layers of a transformers model; raise UsageError with the hint if it has none."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"a {type(model).__name__} has no layers of transformers' GradientCheckpointingLayer", hint=hint
        )
    return layers
