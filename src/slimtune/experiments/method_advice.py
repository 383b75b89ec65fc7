"""Which of the compared methods to take: first decided, then said in one sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.foundation.formatting import format_bytes, format_duration
from .experiment_results import COSTS, ComparedMethod, Cost, PairedDifference

SIGNIFICANCE = 0.05
"""A difference with a corrected p-value below this is beyond noise."""
TOLERANCE = 0.1
"""Costs within this share of the least count as equal (peaks and times vary by themselves), and so does a gain that is
surely at most this share below the best."""


@dataclass(frozen=True, kw_only=True)
class MethodAdvice:
    """Which method to take, which are as good as the best, which may be, and which are worse."""

    comparison_status: Literal["nothing finished", "no proven gain", "one method", "one seed", "compared"]
    """What the comparison proves; only if methods were "compared" there is a choice beyond the best."""
    best: ComparedMethod | None = None
    """The ranked method with the highest gain."""
    choice: ComparedMethod | None = None
    """The method to take: the best, or a cheaper one that is as good; None: none is proven."""
    as_good: Sequence[ComparedMethod] = ()
    """Methods that are surely within a tenth of the best gain, without the best."""
    undecided: Sequence[ComparedMethod] = ()
    """Methods that may be as good as the best, or worse."""
    worse: Sequence[ComparedMethod] = ()
    """Methods that are worse than the best beyond noise."""
    not_ranked: Sequence[ComparedMethod] = ()
    """Methods of which a run failed."""
    largest_gaps: dict[str, float] = field(default_factory=dict)
    """By how much each method may be worse than the best: the upper end of the 95 % interval."""
    cheaper: dict[Cost, ComparedMethod] = field(default_factory=dict)
    """The costs that another method which is as good as the choice has lower, and that method."""

    @property
    def others(self) -> list[ComparedMethod]:
        """The ranked methods without the best."""
        return [*self.as_good, *self.undecided, *self.worse]


def choose_best_or_cheaper_method(methods: Sequence[ComparedMethod], pairs: Sequence[PairedDifference]) -> MethodAdvice:
    """Choose the best method, or a cheaper one that is as good.

    A method is as good if the whole interval of its difference stays within a tenth of the best gain; a wide interval
    around zero proves nothing. Cheaper means cheapest in most of memory, size and time, where costs within a tenth
    count as equal.

    Args:
        methods: the best first.
        pairs: their differences.
    """
    not_ranked = [m for m in methods if not m.ranked]
    ranked = [m for m in methods if m.ranked]
    if not ranked:
        return MethodAdvice(comparison_status="nothing finished", not_ranked=not_ranked)
    best, others = ranked[0], ranked[1:]
    if best.gain.low <= 0:
        return MethodAdvice(comparison_status="no proven gain", best=best, undecided=others, not_ranked=not_ranked)
    if not others:
        return MethodAdvice(comparison_status="one method", best=best, choice=best, not_ranked=not_ranked)
    if len(best.seeds) < 2:
        return MethodAdvice(comparison_status="one seed", best=best, undecided=others, not_ranked=not_ranked)
    with_best = {p.b: p for p in pairs if p.a == best.method}
    gaps = {name: pair.ci95[1] for name, pair in with_best.items()}
    as_good = [m for m in others if gaps.get(m.method, math.inf) <= TOLERANCE * best.gain.value]
    worse = [m for m in others if m not in as_good and m.method in with_best and with_best[m.method].beyond_noise]
    choices = [best, *as_good]
    cheapest = {cost: min(choices, key=lambda m: m.get_cost(cost)) for cost in COSTS}

    def list_high_costs(method: ComparedMethod) -> list[Cost]:
        return [c for c in COSTS if method.get_cost(c) > (1 + TOLERANCE) * cheapest[c].get_cost(c)]

    choice = min(choices, key=lambda m: (len(list_high_costs(m)), -m.gain.value))
    return MethodAdvice(
        comparison_status="compared",
        best=best,
        choice=choice,
        as_good=as_good,
        undecided=[m for m in others if m not in as_good and m not in worse],
        worse=worse,
        not_ranked=not_ranked,
        largest_gaps=gaps,
        cheaper={cost: cheapest[cost] for cost in list_high_costs(choice)},
    )


def format_method_advice(advice: MethodAdvice) -> str:
    """Return the advice in one sentence, and which methods are not ranked in another."""
    ranked = _format_ranked(advice)
    return ranked + (
        f" Not ranked, because a run failed: {_join_names(advice.not_ranked)}." if advice.not_ranked else ""
    )


def _format_ranked(advice: MethodAdvice) -> str:
    best = advice.best
    if best is None:
        return "No method has finished its runs, so there is nothing to advise."
    name, measure = best.method, best.gain_name
    if advice.comparison_status == "no proven gain":
        return f"Take none of them: the {measure} of the best, {name}, is not beyond noise ({_format_gain(best)})."
    if advice.comparison_status == "one method":
        return f"Only {name} was measured: {measure} {_format_gain(best)}."
    if advice.comparison_status == "one seed":
        gaps = [f"{m.method} is behind by {best.gain.value - m.gain.value:.3f}" for m in advice.others]
        reason = "with one seed, the effect of another seed is unknown (--seeds 3 measures it)"
        highest = f"with this one {name} has the highest {measure} ({_format_gain(best)})"
        return f"No method is proven to be the best: {reason}; {highest}; {'; '.join(gaps)}."
    choice = advice.choice
    assert choice is not None
    size, duration = format_bytes(choice.file_bytes), format_duration(choice.time_seconds)
    costs = f"{format_bytes(choice.peak_bytes)}, a file of {size}, {duration} per run"
    parts = [f"Take {choice.method} ({measure} {_format_gain(choice)}; {costs})"]
    if advice.as_good:
        names = _join_names([best, *advice.as_good])
        parts.append(f"{names} are as good as one another, within a tenth of the {measure}")
        parts += [f"of these {method.method} takes the least {cost}" for cost, method in advice.cheaper.items()]
    if advice.undecided:
        verb = "does" if len(advice.undecided) == 1 else "do"
        text = f"{_join_names(advice.undecided)} {verb} not differ from {name} beyond noise"
        gaps_known = [advice.largest_gaps[m.method] for m in advice.undecided if m.method in advice.largest_gaps]
        if gaps_known:
            text += f", but may be up to {max(gaps_known):.3f} worse: more seeds or test rows would tell"
        parts.append(text)
    if advice.worse:
        distances = sorted(best.gain.value - m.gain.value for m in advice.worse)
        span = " to ".join(dict.fromkeys(f"{gap:.3f}" for gap in (distances[0], distances[-1])))
        verb = "is" if len(advice.worse) == 1 else "are"
        parts.append(f"{_join_names(advice.worse)} {verb} worse than {name} by {span} {best.gain_unit}")
    return "; ".join(parts) + "."


def _format_gain(method: ComparedMethod) -> str:
    gain = method.gain
    return f"{gain.value:.3f} {method.gain_unit}, {gain.low:.3f} to {gain.high:.3f}"


def _join_names(methods: Sequence[ComparedMethod]) -> str:
    names = [m.method for m in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
