"""Autograd steps that save only their input and recompute the rest in the backward pass.

`linear_recomputing_weight`: a linear layer whose weight is computed from small tensors p,

    y = x M(p)ᵀ        x (..., in), M(p) (out, in)

saves x and p; the full weight exists only while the layer runs.

`run_in_token_tiles`: a map of tokens, run on a few tokens at a time,

    y[:, i] depends only on x[:, i]          x (batch, tokens, ...), y (batch, tokens, ...)

saves x. Norms and MLPs are such maps, and their activations between x and y take up to ten times the memory of x; in
tiles they exist for one tile at a time. Gradients of parameters are summed over the tiles.

`gated_linear_recomputing_product`: the second half of a gated MLP,

    y = linear(h),  h = activation(gate) * up          gate, up, h (..., d), y (..., out)

saves gate and up. Separate operations also save activation(gate) and, if `linear` has an adapter, h.

Outputs and gradients are the same bits as those of the separate operations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import ModelError
from .dropout import fork_rng, get_rng_state


def linear_recomputing_weight(make_weight: Callable[..., Tensor], x: Tensor, *weight_inputs: Tensor) -> Tensor:
    """Return `x make_weight(*weight_inputs)ᵀ` in x's dtype.

    Args:
        make_weight: returns the weight `(out, in)` from `weight_inputs` by differentiable, deterministic operations.
        x: `(..., in)`.
        weight_inputs: what the weight is computed from; other tensors that `make_weight` uses get no gradient.
    """
    return _RecomputeLinear.apply(make_weight, x, *weight_inputs)


class _RecomputeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make_weight: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.make_weight = make_weight
        ctx.save_for_backward(x, *tensors)
        return F.linear(x, make_weight(*tensors).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            weight = ctx.make_weight(*tensors)
        grad_x = (grad @ weight.detach().to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        grads: list[Tensor] = []
        if any(needed):
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)
            inputs = [t for t in tensors if t.requires_grad]
            grads += torch.autograd.grad(weight, inputs, grad_weight.to(weight.dtype))
        return None, grad_x, *(grads.pop(0) if need else None for need in needed)


def run_in_token_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int, trained: Sequence[Tensor]
) -> Tensor:
    """Return `function(x)`, computed for `tile_size` tokens of each row at a time.

    Args:
        function: a map that treats each token independently.
        x: `(batch, tokens, ...)`.
        tile_size: tokens per tile and row.
        trained: all parameters in `function` that need gradients.

    Raises:
        ModelError: in the backward pass, if `function` trains a parameter that is not in `trained`.
    """
    if x.shape[1] <= tile_size:
        return function(x)
    if not torch.is_grad_enabled():
        return _run_tiles(function, x, tile_size)
    saved: list[Any] = []
    x = _SaveInput.apply(x, saved) if x.requires_grad else x  # without a gradient it would save nothing
    return _TiledMap.apply(function, tile_size, saved, x, *trained)


def gated_linear_recomputing_product(
    activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, linear: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `linear(activation(gate) * up)` and keep only gate and up of what comes before `linear`.

    Not for use inside activation checkpointing, which does not see what `linear` keeps.

    Args:
        activation: an elementwise function without parameters.
        gate, up: `(..., d)`.
        linear: any module; if it keeps its input for the backward pass, that is computed again there.
    """
    hidden = _GatedProduct.apply(activation, gate, up)
    if hidden.grad_fn is None:
        return linear(hidden)
    node, size, storages = hidden.grad_fn, hidden.numel(), [hidden.untyped_storage()]

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        is_hidden = tensor.untyped_storage() in storages and tensor.numel() == size and tensor.is_contiguous()
        return tensor.shape if is_hidden else tensor

    def unpack(saved: Tensor | torch.Size) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        _, activated, up = _activate_again(node)
        return (activated.detach() * up).view(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = linear(hidden)
    storages.clear()  # the graph keeps `pack`
    return out


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation, ctx.activated = activation, None
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_gate, need_up = ctx.needs_input_grad
        gate, activated, up = _activate_again(ctx)
        grad_gate = torch.autograd.grad(activated, gate, grad * up)[0] if need_gate else None
        ctx.activated = None
        return None, grad_gate, grad * activated.detach() if need_up else None


def _activate_again(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gate, its activation with a graph between them, and up, of a `_GatedProduct`."""
    if node.activated is None:
        gate, up = node.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            node.activated = gate, node.activation(gate), up
    return node.activated


class _SaveInput(torch.autograd.Function):
    # Saves x before the map runs instead of after it. If activation checkpointing recomputes this part and needs
    # nothing behind it, recomputation stops here, and the map runs twice in all instead of three times.

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: list[Any]) -> Tensor:
        ctx.save_for_backward(x)
        saved.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TiledMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], tokens: int, saved: list[Any], x: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.run, ctx.tokens, ctx.saved, ctx.trained = run, tokens, saved, trained
        ctx.rng_state = get_rng_state(x.device)
        ctx.save_for_backward(None if saved else x)
        return _run_tiles(run, x, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = (ctx.saved.pop() if ctx.saved else ctx).saved_tensors
        need_x, needed = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        trained = [p for p, need in zip(ctx.trained, needed, strict=True) if need]
        grad_x = torch.empty_like(x) if need_x else None
        sums: list[Tensor | None] = [None] * len(trained)
        with fork_rng(ctx.rng_state, x.device):
            for tile in _iterate_tiles(x, ctx.tokens):
                part = x[tile].detach().requires_grad_(need_x)
                with torch.enable_grad():
                    y = ctx.run(part)
                if tile[1].start == 0:
                    _check_no_other_leaf(y, [part, *trained])
                grads = torch.autograd.grad(y, [part] * need_x + trained, grad[tile], allow_unused=True)
                del y
                if grad_x is not None:
                    grad_x[tile] = grads[0]
                for i, g in enumerate(grads[need_x:]):
                    total = sums[i]
                    if g is not None:  # not added in place: it may be a view of `grad`
                        sums[i] = g if total is None else total + g
                del grads, part
        return None, None, None, grad_x, *(sums.pop(0) if need else None for need in needed)


def _run_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    out: Tensor | None = None
    with torch.no_grad():
        for tile in _iterate_tiles(x, tokens):
            y = run(x[tile])
            if out is None:
                out = y.new_empty(*x.shape[:2], *y.shape[2:])
            out[tile] = y
            del y
    assert out is not None
    return out


def _iterate_tiles(x: Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, x.shape[1], tokens):
        yield slice(None), slice(start, start + tokens)


def _check_no_other_leaf(y: Tensor, known: Sequence[Tensor]) -> None:
    """Raise if gradients of `y` reach a leaf tensor that is not in `known`, which would silently get no gradient."""
    known_ids, visited, queue = {id(t) for t in known}, set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            problem = f"a tiled map trains a parameter {tuple(leaf.shape)} that does not belong to its module"
            expected = "a method whose modules register what they train, or name the module that has it in `shared`"
            raise ModelError(problem, expected, "--set train.mlp_tile_size=null")
        queue += [n for n, _ in node.next_functions]
