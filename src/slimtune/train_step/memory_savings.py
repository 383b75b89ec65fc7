"""Holding less of a step at once: what is computed twice, in parts, or kept elsewhere, with the same gradients.

    checkpointed   of each layer its input is kept; the layer is run again in the backward pass
    offloaded      those inputs lie in the machine's memory meanwhile (`kernels/activation_offload.py`)
    tiled          norms and feed-forwards run a few tokens at a time, in both passes (`kernels/tiled_mlp.py`)

With all three a row takes on the device what one layer's attention takes, and a few hidden states beside it.
"""

from __future__ import annotations

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


def enable_activation_checkpointing(model: Any, *, offload: bool = False) -> None:
    """Keep of each layer of a model its input alone, in place.

    Args:
        model: a transformers model, adapted or not.
        offload: keep the inputs in the machine's memory.

    Raises:
        UsageError: the model's layers cannot be checkpointed.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"a {type(model).__name__} cannot compute its activations twice", hint="leave out the checkpointing"
        )
    # transformers 5.2x renamed it; the old name warns there, the new one is missing before.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    # A leaf that is there for the whole step, and which only reentrant checkpoints need.
    model.disable_input_require_grads()
    if offload:
        away = ActivationOffload()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_offloaded, away, module._gradient_checkpointing_func)


def enable_tiled_mlp(model: Any, tokens: int) -> int:
    """Run the norms and feed-forwards of a model's layers `tokens` tokens at a time, in place; return how many.

    A longer pass than that holds what they compute on the way for so many tokens alone. Dropout in them draws other
    numbers than without tiles.

    Args:
        model: a transformers model, adapted before.
        tokens: of each row, from 1.

    Raises:
        UsageError: the model has no layers that are known as such.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = [m for layer in layers for m in _by_token(layer)]
    # The one behind the last layer.
    inside += [m for m in model.modules() if layer_kind(m) == "norm" and m not in set(inside)]
    if not layers:
        raise UsageError(f"a {type(model).__name__} has no layers that are known as such", hint="leave out the tiles")
    for module in inside:
        before = vars(module).get("forward")
        module.forward = partial(_tiled, module, tokens, before)
    return len(inside)


def _by_token(layer: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of a layer that map each token by itself."""
    names = {n: m for n, m in layer.named_modules() if n in FEED_FORWARD or layer_kind(m) == "norm"}
    return [m for n, m in names.items() if not any(n.startswith(f"{o}.") for o in names)]


def _tiled(module: Any, tokens: int, before: Callable[..., Any] | None, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the forward of a module; of what another than the hidden states goes in, nothing is known."""
    run = before or partial(type(module).forward, module)
    if args or kwargs or not isinstance(x, Tensor) or x.dim() < 3:
        return run(x, *args, **kwargs)
    trained = [p for p in module.parameters() if p.requires_grad]
    return run_tiled(run, x, max(1, tokens // x.shape[0]), trained)


def _offloaded(away: ActivationOffload, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    # Hidden states are a layer's first argument; what comes after them, all layers share.
    with away.keeping():
        return checkpoint(run, *args)
