"""Why an engine does not compute the trained adapter: the model variant whose log-probabilities are nearest to its own.

    e   log p of the next tokens in the engine      b   of the base, computed here; both relative to the trained adapter
    not applied      e is b
    another scale    e is the base with s times the adapter, for an s that is fitted
    partly           e is the adapter without some kinds of modules, or without a quarter of the layers
    rounding         e is 0 with errors that have no direction, more than the precision explains
    another adapter  e is none of them, and the base itself, asked in the same engine, is right
    another base     e is none of them, or the base itself, asked in the same engine, differs

Each variant is computed with the base loaded once: the adapter's tensors are interpolated, and restored at the end.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..extras.adapter_strength import AdapterTensorInterpolator
from .export_results import EngineCause

SCALES = (0.25, 0.5, 2.0, 4.0)
"""Strengths from which the fit starts, besides the share of the effect that arrives."""
EXPLAINED = 0.25
"""A variant explains an engine if it is this much nearer than the adapter as it was trained."""
_MOST_REMOVALS = 4
CAUSES_IN_ADAPTER = ("not-applied", "another-scale", "partly")
"""Causes in how an engine reads an adapter's file, whatever becomes of prompts: another file may mend them."""


@dataclass(frozen=True)
class EngineDiagnosis:
    """What an engine computes instead of the trained adapter."""

    cause: EngineCause
    text: str = ""
    scale: float | None = None  # strength that the engine has, of "another-scale"
    missing: tuple[str, ...] = ()  # parts of the adapter that the engine lacks, of "partly"


class AdapterVariants:
    """Computes log-probabilities of the adapter at other strengths, and without some of its modules.

    Args:
        model: the adapted model.
        compute: returns the current model's log-probabilities `(n,)`, relative to the adapter's as it was trained.
    """

    def __init__(self, model: Any, adapter_name: str, compute: Callable[[], Tensor]) -> None:
        self.model, self.adapter_name, self._compute = model, adapter_name, compute
        self.modules = list(model.adapted_layers(adapter_name))

    def compute(self, strength: float, modules: Sequence[str] | None = None) -> Tensor:
        """Return the log-probabilities with the adapter's change of some modules, or of all, times `strength`."""
        interpolator = AdapterTensorInterpolator(self.model, self.adapter_name, modules)
        interpolator.set(strength)
        try:
            return self._compute()
        finally:
            interpolator.set(1)

    def group_modules(self) -> dict[str, list[str]]:
        """Return the modules by their kind (`q_proj`), and by quarters of the layers."""
        groups: dict[str, list[str]] = {}
        indices = {name: int(m[1]) for name in self.modules if (m := re.search(r"\.(\d+)\.", name))}
        layers = sorted({*indices.values()})
        size = max(1, math.ceil(len(layers) / 4))
        for name in self.modules:
            groups.setdefault(name.rpartition(".")[2], []).append(name)
            if name in indices and len(layers) > 1:
                first = layers[layers.index(indices[name]) // size * size]
                last = min(first + size - 1, layers[-1])
                groups.setdefault(f"layers {first} to {last}" if last > first else f"layer {first}", []).append(name)
        return {name: modules for name, modules in groups.items() if len(modules) < len(self.modules)}


def diagnose_engine(
    engine: Tensor, base: Tensor, noise: float, variants: AdapterVariants, *, is_base_right: bool = False
) -> EngineDiagnosis:
    """Return which variant of the adapter an engine computes that is not the trained one.

    Args:
        engine, base: log-probabilities of the same tokens `(n,)`, relative to the trained adapter's.
        noise: mean distance in nats that the engine's arithmetic and the precision of its weights explain.
        variants: computes the log-probabilities of variants.
        is_base_right: whether the engine's own base was asked and is the one of the training.
    """
    effect, distance, from_base = (each.abs().mean().item() for each in (base, engine, engine - base))
    if effect < 2 * noise:
        return EngineDiagnosis("not-proven", f"rounding of {noise:.2g} nats hides the adapter's effect, {effect:.2g}")
    if from_base <= max(noise, 0.1 * effect):
        return EngineDiagnosis("not-applied", "it answers as the base does")
    share = 1 - (engine * base).sum().item() / base.square().sum().item()  # of the effect that arrives
    explained = max(noise, EXPLAINED * distance)
    scale, scale_distance = _fit_scale(engine, base, share, explained, variants.compute)
    missing, part_distance = tuple[str, ...](), math.inf
    if scale_distance > max(noise, 0.4 * explained):  # the simpler explanation is not enough
        missing, part_distance = _find_missing_parts(engine, variants)
    if min(scale_distance, part_distance) <= explained:
        if scale_distance <= part_distance:
            return EngineDiagnosis("another-scale", f"it applies the adapter {scale:.3g} times", scale=scale)
        return EngineDiagnosis("partly", f"it computes the adapter without {', '.join(missing)}", missing=missing)
    if 0.75 <= share <= 1.25 and distance <= effect * (0.2 if is_base_right else 1):  # rounding shows in the base, too
        text = f"the adapter arrives with {share:.0%} of its strength, and errors of {distance:.2g} nats around it"
        return EngineDiagnosis("rounding", text)
    text = f"it is {distance:.2g} nats from the adapter and {from_base:.2g} from the base, on average"
    if is_base_right:
        return EngineDiagnosis("another-adapter", f"{text}, on the right base")
    return EngineDiagnosis("another-base", text)


def _fit_scale(
    engine: Tensor, base: Tensor, share: float, explained: float, compute: Callable[[float], Tensor]
) -> tuple[float, float]:
    """Return the strength whose log-probabilities are nearest to an engine's, and their mean distance from them."""
    tried: dict[float, Tensor] = {1.0: base * 0, 0.0: base}

    def measure_distance(scale: float) -> float:
        if scale not in tried:
            tried[scale] = compute(scale)
        return (engine - tried[scale]).abs().mean().item()

    best = 1.0
    for starts in ([share] if 0.02 < share < 16 else [], SCALES):
        best = min([best, *starts], key=measure_distance)
        for _ in range(4):  # Gauss-Newton: the change is not linear in the strength
            slope = (compute(best * 1.02) - tried[best]) / (0.02 * best)
            step = ((engine - tried[best]) * slope).sum().item() / slope.square().sum().clamp_min(1e-12).item()
            better = min(max(best + step, best / 3), best * 3)
            if measure_distance(better) >= measure_distance(best) * 0.99:
                break
            best = better
        if measure_distance(best) <= explained:
            break
    return best, measure_distance(best)


def _find_missing_parts(engine: Tensor, variants: AdapterVariants) -> tuple[tuple[str, ...], float]:
    """Return the parts of an adapter without which it is nearest to an engine, and its mean distance from it.

    The effect of each part is computed once, and effects are added to choose; the chosen variant is computed.
    """
    groups = variants.group_modules()
    without = {name: variants.compute(0, modules) for name, modules in groups.items()}
    missing, rest = list[str](), engine  # `rest`: what the engine lacks beyond the missing parts
    for _ in range(_MOST_REMOVALS):
        left = {name: (rest - without[name]).abs().mean().item() for name in groups.keys() - missing}
        if not left or min(left.values()) > 0.8 * rest.abs().mean().item():
            break
        missing.append(min(left, key=lambda name: left[name]))
        rest = rest - without[missing[-1]]
    removed = list(dict.fromkeys(module for name in missing for module in groups[name]))
    if len(removed) in (0, len(variants.modules)):
        return (), math.inf
    missing.sort(key=list(groups).index)  # modules in their order: which weighs more may be noise
    return tuple(missing), (engine - variants.compute(0, removed)).abs().mean().item()
