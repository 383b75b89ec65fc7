"""What adapters change at each layer's weight, as seen from outside: factors, or the whole difference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, format_names
from .base import AdapterModule, MergeUnsupported, SharedParameters, Site
from .layer import get_site


@dataclass(frozen=True)
class WeightDelta:
    """One adapter's change of one layer's weight, and its factor in the sum."""

    adapter: str
    weight: float
    delta: AdapterModule
    site: Site

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that sums are made in: the adapter's, fp32 at least."""
        kept = next((p.dtype for p in self.delta.parameters()), torch.float32)
        return torch.promote_types(kept, torch.float32)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """`A (r, in), B (out, r), scale`, fp32 at least, None where the change has no such form."""
        found = self.delta.low_rank_factors()
        return None if found is None else (found[0].to(self.dtype), found[1].to(self.dtype), float(found[2]))

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """The same, where it is known to have that form."""
        found = self.low_rank_factors()
        assert found is not None
        return found

    def dense(self) -> Tensor:
        """`ΔW (out, in)`, without the factor in the sum."""
        found = self.low_rank_factors()
        if found is not None:
            return (found[1] @ found[0]) * found[2]
        # A small difference of large numbers: float64.
        before, bias = self.site.weight().double(), self.site.bias()
        try:
            after, bias_after = self.delta.merge_into(before, bias)
        except MergeUnsupported as e:
            raise no_weight(self.adapter, self.site.name, str(e)) from e
        if bias_after is not bias:
            raise no_weight(self.adapter, self.site.name, "it changes the bias")
        return (after.double() - before).to(self.dtype)


def base_weights_only(model: Any) -> AbstractContextManager[None]:
    """Let the base's own weights stand for a while: no adapter's copies in their place."""
    model._unmerged()
    return model.disable_adapter()


def get_weight_deltas(model: Any, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, list[WeightDelta]]:
    """Return for each layer the adapters' changes, in the model's order."""
    at = model._attached
    owners: dict[str, str] = {}
    terms: dict[str, list[WeightDelta]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        report = at.reports[adapter]
        if report.biases:
            raise no_weight(adapter, report.biases[0], "it trains biases")
        for name, module in at.members[adapter]:
            if adapter in module.trained_copies and owners.setdefault(name, adapter) != adapter:
                raise UsageError(
                    f"adapters {owners[name]!r} and {adapter!r} both train {name} whole",
                    "at most one that trains a module whole",
                )
            delta = module.adapters[adapter] if adapter in module.adapters else None  # noqa: SIM401 (a ModuleDict)
            if delta is None or isinstance(delta, SharedParameters):
                continue
            kind = report.kinds[name]
            if kind not in ("linear", "embedding"):
                raise no_weight(adapter, name, f"what it changes is a {kind}")
            terms.setdefault(name, []).append(WeightDelta(adapter, float(weight), delta, get_site(name, kind, model)))
    if not terms:
        raise UsageError(f"{format_names(adapters)} change no layer's weight", "an adapter that does")
    return {n: terms[n] for n, _ in model.named_modules() if n in terms}


def no_weight(adapter: str, name: str, why: str) -> UsageError:
    """Return the error that says why an adapter is no change of weights alone."""
    return UsageError(
        f"adapter {adapter!r} cannot become a LoRA, at {name or 'the model'}: {why}",
        "an adapter that changes weights of linear maps and embeddings alone",
    )
