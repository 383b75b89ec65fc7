"""Calling a PeftModel: rows of one batch through different adapters, and what a method adds to a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import UsageError, listed, nearest
from .layer import BASE_ROW


class AdapterCalls:
    """The part of a `PeftModel` that is called."""

    def __call__(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model as its base's forward is run.

        Args:
            args, kwargs: the base's own.
            adapter_names: each row's adapter, for a batch whose rows use different ones; "__base__" for none.
        """
        with self._mixed(adapter_names):
            out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.training and getattr(out, "loss", None) is not None:
            penalty = self.penalty()
            if penalty is not None:
                out.loss = out.loss + penalty
        return out

    def generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate as the base does; `adapter_names` as in a call. Beams share their row's adapter."""
        with self._mixed(adapter_names):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def penalty(self: Any) -> Tensor | None:
        """Return what the active adapters' methods add to a training loss, None for nothing."""
        at = self._attached
        parts = [at.configs[n].penalty(at.deltas(n)) for n in (at.active if at.enabled else [])]
        parts = [p for p in parts if p is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def update_and_allocate(self: Any, global_step: int) -> None:
        """Let the active adapters' methods do what they do after an optimizer step (AdaLoRA moves rank).

        Call it after `optimizer.step()` and before the gradients are cleared.

        Args:
            global_step: the step taken, from 1.
        """
        for name in self._attached.active:
            self._attached.configs[name].stepped(self._attached.deltas(name), global_step)

    @contextmanager
    def _mixed(self: Any, names: Sequence[str] | None) -> Iterator[None]:
        at = self._attached
        if names is None:
            yield
            return
        for name in dict.fromkeys(names):
            if name != BASE_ROW and name not in at.configs:
                raise UsageError(
                    f"adapter_names: there is no adapter {name!r}{nearest(name, at.configs)}",
                    f"one of {listed([*at.configs, BASE_ROW])}",
                )
        if at.merged:
            raise UsageError(
                f"{listed(at.merged)} is merged into the base", "an unmerged model", "unmerge_adapter() first"
            )
        before, at.running.rows = at.running.rows, tuple(names)
        try:
            yield
        finally:
            at.running.rows = before
