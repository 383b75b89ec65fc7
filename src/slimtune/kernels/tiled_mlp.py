"""A map of tokens run on a few of them at a time, forwards and backwards, of which only the input is kept.

    y[:, i] hangs on x[:, i] alone          x (batch, tokens, ...), y (batch, tokens, ...)

Norms and feed-forwards are such maps, and what they hold between x and y is up to ten times x. Tile by tile it is held
for a tile alone, and computed again in the backward pass. Gradients are those of the plain way: a parameter's is summed
over the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelError
from .dropout import fork_rng, get_rng_state


def run_tiled(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int, trained: Sequence[Tensor]) -> Tensor:
    """Return `run(x)`, computed `tokens` of a row at a time.

    Args:
        run: maps each token by itself.
        x: `(batch, tokens, ...)`.
        tokens: of each row that are computed at once.
        trained: the parameters in `run` that get gradients, every one.

    Raises:
        ModelError: in the backward pass, where `run` holds a trained parameter that is not in `trained`.
    """
    if x.shape[1] <= tokens:
        return run(x)
    if not torch.is_grad_enabled():
        return _filled(run, x, tokens)
    kept: list[Any] = []
    x = _Kept.apply(x, kept) if x.requires_grad else x  # without a gradient it would keep nothing
    return _Tiled.apply(run, tokens, kept, x, *trained)


class _Kept(torch.autograd.Function):
    # Keeps x before the map is run, not after: so a checkpoint that is computed again stops here where nothing behind
    # the map is wanted, and the map is run twice in all, not three times.

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(x)
        kept.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], tokens: int, kept: list[Any], x: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.run, ctx.tokens, ctx.kept, ctx.trained = run, tokens, kept, trained
        ctx.random = get_rng_state(x.device)
        ctx.save_for_backward(None if kept else x)
        return _filled(run, x, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = (ctx.kept.pop() if ctx.kept else ctx).saved_tensors
        for_x = ctx.needs_input_grad[3]
        trained = [p for p, want in zip(ctx.trained, ctx.needs_input_grad[4:], strict=True) if want]
        gx = torch.empty_like(x) if for_x else None
        sums: list[Tensor | None] = [None] * len(trained)
        with fork_rng(ctx.random, x.device):
            for at in _tiles(x, ctx.tokens):
                part = x[at].detach().requires_grad_(for_x)
                with torch.enable_grad():
                    y = ctx.run(part)
                if at[1].start == 0:
                    _require_known(y, [part, *trained])
                found = torch.autograd.grad(y, [part] * for_x + trained, grad[at], allow_unused=True)
                del y
                if gx is not None:
                    gx[at] = found[0]
                for i, g in enumerate(found[for_x:]):
                    so_far = sums[i]
                    if g is not None:  # not added in place: it may be a view of `grad`
                        sums[i] = g if so_far is None else so_far + g
                del found, part
        given = iter(sums)
        return None, None, None, gx, *(next(given) if want else None for want in ctx.needs_input_grad[4:])


def _filled(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    out: Tensor | None = None
    with torch.no_grad():
        for at in _tiles(x, tokens):
            y = run(x[at])
            if out is None:
                out = y.new_empty(*x.shape[:2], *y.shape[2:])
            out[at] = y
            del y
    assert out is not None
    return out


def _tiles(x: Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, x.shape[1], tokens):
        yield slice(None), slice(start, start + tokens)


def _require_known(y: Tensor, known: Sequence[Tensor]) -> None:
    """Raise where gradients of `y` reach a leaf that is not known: it would get none."""
    leaves, seen, ahead = {id(t) for t in known}, set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            raise ModelError(
                f"a map that is computed in tiles trains a parameter {tuple(leaf.shape)} that is none of its module's",
                "methods that register what they train",
                "--set train.mlp_tile_size=null",
            )
        ahead += [n for n, _ in node.next_functions]
