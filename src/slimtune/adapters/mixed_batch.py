"""Calling a PeftModel: rows of one batch through different adapters, and what a method adds to a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.packed_layout import LAYOUT_KWARG
from ..errors import UsageError, format_names, nearest
from ..kernels.batched_lora import group_names, stack_factors


class AdapterCalls:
    """The part of a `PeftModel` that is called."""

    def __call__(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model as its base's forward is run.

        Args:
            args, kwargs: the base's own.
            adapter_names: each row's adapter, for a batch whose rows use different ones; "__base__" for none.
        """
        with self._mixed(adapter_names, args, kwargs):
            out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.training and getattr(out, "loss", None) is not None:
            penalty = self.regularization_loss()
            if penalty is not None:
                out.loss = out.loss + penalty
        return out

    def generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate as the base does; `adapter_names` as in a call. Beams share their row's adapter."""
        with self._mixed(adapter_names, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def regularization_loss(self: Any) -> Tensor | None:
        """Return what the active adapters' methods add to a training loss, None for nothing."""
        at = self._attached
        parts = [at.configs[n].regularization_loss(at.deltas(n)) for n in (at.active if at.enabled else [])]
        parts = [p for p in parts if p is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def update_and_allocate(self: Any, global_step: int) -> None:
        """Let the active adapters' methods do what they do after an optimizer step (AdaLoRA moves rank).

        Call it after `optimizer.step()` and before the gradients are cleared.

        Args:
            global_step: the step taken, from 1.
        """
        for name in self._attached.active:
            self._attached.configs[name].on_step_end(self._attached.deltas(name), global_step)

    def _set_gradient_checkpointing(self: Any, enable: bool = True, **kwargs: Any) -> None:
        # Both of transformers' public names come here. A frozen embedding's output must carry a gradient, or the
        # reentrant kind of checkpointing would train nothing; the other kind would keep it for nothing.
        super()._set_gradient_checkpointing(enable=enable, **kwargs)  # type: ignore[misc]
        settings = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        if enable and settings.get("use_reentrant", True):
            self._inputs_carry_gradients()

    def _inputs_carry_gradients(self: Any) -> None:
        if not self._attached.input_grads and hasattr(self, "enable_input_require_grads"):
            self.enable_input_require_grads()
            self._attached.input_grads = True

    @contextmanager
    def _mixed(self: Any, names: Sequence[str] | None, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        at = self._attached
        if names is None:
            yield
            return
        if LAYOUT_KWARG in kwargs:
            raise UsageError(
                "adapter_names for rows laid in one sequence, which is one row of the batch",
                "rows of a padded batch, each with its name",
                "collator_for(model, pad_token_id, packing=False), or set_adapter and one adapter for all",
            )
        rows = _rows(args, kwargs)
        if isinstance(names, str) or (rows is not None and len(names) != rows):
            given = repr(names) if isinstance(names, str) else f"{len(names)} names"
            raise UsageError(
                f"adapter_names is {given} for a batch of {rows} rows",
                "a list: one name a row",
                f"{BASE_ROW!r} for a row of the base",
            )
        for name in dict.fromkeys(names):
            if name != BASE_ROW and name not in at.configs:
                raise UsageError(
                    f"adapter_names: there is no adapter {name!r}{nearest(name, [*at.configs, BASE_ROW])}",
                    f"one of {format_names([*at.configs, BASE_ROW])}",
                )
        self._unmerged()
        self._enabled("adapter_names")
        if at.running.rows is not None:
            raise UsageError("another call with adapter_names is still running", "one such call of a model at a time")
        if self.training and torch.is_grad_enabled() and _checkpoints(self):
            raise UsageError(
                "adapter_names while training with activation checkpointing: the recomputed forward would not know",
                "either of the two",
                "gradient_checkpointing_disable(), or set_adapter and batches of one adapter",
            )
        at.running.rows = tuple(names)
        at.running.turn += 1
        try:
            yield
        finally:
            at.running.rows = None


def _checkpoints(model: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _rows(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Return how many rows a call's batch has, None where that is not to be seen."""
    known = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values", "attention_mask")
    found = [*args[:1], *(kwargs.get(n) for n in known)]
    return next((int(v.shape[0]) for v in found if isinstance(v, Tensor) and v.dim()), None)


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
