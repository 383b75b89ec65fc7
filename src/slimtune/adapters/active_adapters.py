"""What the adapted modules of one model run with: the one object they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.batched_lora import group_names, stack_factors

BASE_ROW = "__base__"
"""The name that leaves a row of a mixed batch to the base (PEFT's)."""


class Stack(NamedTuple):
    """The factors of one module's rows, stacked; the call and batch they were last used for; what they are made of."""

    turn: int
    batch: int
    A: Tensor
    B: Tensor
    made_of: tuple
    held: list[Tensor]
    """Those factors: while they are held, no other tensor gets their `id`."""


@dataclass
class ActiveAdapters:
    """What the adapted modules of one model run with.

    Args:
        active: adapters whose deltas run and whose copies stand for the module's parameters, in order.
        rows: where the rows of the batch use different adapters: each row's adapter, `BASE_ROW` for none.
        turn: counts the calls with rows.
    """

    active: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    turn: int = 0
    _masks: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)
    _stacks: dict[nn.Module, Stack] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one module must not bring the others along.
        return {**vars(self), "_masks": {}, "_stacks": {}}

    def names(self, batch: int) -> list[str]:
        """Return each row's adapter in a batch; beams repeat their row."""
        assert self.rows is not None
        if not self.rows or batch % len(self.rows):
            raise UsageError(
                f"adapter_names names {len(self.rows)} adapters for a batch of {batch} rows",
                "one name a row",
                f"{BASE_ROW!r} for a row of the base",
            )
        return [n for n in self.rows for _ in range(batch // len(self.rows))]

    def masks(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return for each adapter in `rows` its rows as a bool `(batch,)`."""
        key = (self.rows, batch, device)
        if key not in self._masks:
            names = self.names(batch)
            self._masks.clear()
            with torch.inference_mode(False):  # kept for calls that may want gradients
                self._masks[key] = {
                    n: torch.tensor([m == n for m in names], device=device)
                    for n in dict.fromkeys(names)
                    if n != BASE_ROW
                }
        return self._masks[key]

    def kept(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors that were stacked for a module earlier in this call, None where there are none."""
        stack = self._stacks.get(module)
        good = stack is not None and (stack.turn, stack.batch, stack.A.dtype) == (self.turn, x.shape[0], x.dtype)
        return (stack.A, stack.B) if good and not torch.is_grad_enabled() else None  # type: ignore[union-attr]

    def stack(self, module: nn.Module, x: Tensor, factors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the factors for the rows of `x`: while gradients are off those of an earlier call, where none changed.

        Args:
            module: the adapted module.
            x: its input `(batch, ..., in)`.
            factors: by adapter name `(A, B, scale)`.
        """
        groups = group_names(self.names(x.shape[0]))
        if torch.is_grad_enabled():
            return stack_factors([factors.get(n) for n in groups], x)
        tensors = [t for A, B, _ in factors.values() for t in (A, B)]
        # Optimizers may write past torch's count of versions: what trains is stacked anew for each call.
        frozen = not any(t.requires_grad or t.is_inference() for t in tensors)
        marks = [(id(t), t._version, t.data_ptr()) for t in tensors] if frozen else [self.turn]
        made_of = (groups, x.dtype, list(factors), [s for _, _, s in factors.values()], marks)
        last = self._stacks.get(module)
        if last is None or last.made_of != made_of:
            A, B = stack_factors([factors.get(n) for n in groups], x)
            last = Stack(self.turn, x.shape[0], A, B, made_of, tensors)
        self._stacks[module] = last._replace(turn=self.turn, batch=x.shape[0])
        return last.A, last.B

    def forget(self) -> None:
        """Let go of what was stacked: adapters came, went or moved."""
        self._stacks.clear()
