"""A step's memory as a formula, found by tracing a model of two layers and one of three.

Layers are alike, and so are tokens, so what a phase takes beside the state is

    bytes = (a + a' d) + (b + b' d) T + (c + c' d) F + (e + e' d) S      d layers, T tokens, S = Σ (tokens of a row)²

    F: T filled up to a power of two, which counts where flex attention runs (not for one very long row); S counts where
    attention keeps its scores

The numbers are solved for, not chosen. The formula is exact but for the rounding of blocks, and bounds from above what
is shorter than a tile; where a whole trace of the job is at hand, `corrected` moves it onto that.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..attention.packed_attention import MAX_SEGMENT_TOKENS, padded_length
from ..attention.register import original_attention, packing_unsupported_reason
from ..errors import UsageError
from .fake_tensors import all_tensors, restore_module
from .memory_trace import BACKWARD, BLOCK, Trace, trace_memory
from .training_job import TrainingJob

DEPTHS = (2, 3)
TOKENS = 1024
PHASES = ("forward", "loss", BACKWARD[0], BACKWARD[2], "optimizer", "evaluation")


@dataclass(frozen=True)
class MemoryModel:
    """Bytes beside the state in each phase, by tokens.

    Args:
        rows: for each phase the numbers that `[1, T, F, S]` are multiplied by.
        off: for each phase what a whole trace took more than the formula.
    """

    rows: dict[str, tuple[float, ...]]
    off: dict[str, float]

    def over_state(self, lengths: Sequence[int]) -> int:
        """Return the most bytes beside the state, over all phases, in a pass of rows of these lengths."""
        return int(max(0.0, *(self.at(phase, lengths) for phase in self.rows)))

    def at(self, phase: str, lengths: Sequence[int]) -> float:
        """Return the bytes beside the state in one phase."""
        found = sum(r * f for r, f in zip(self.rows[phase], _features(lengths), strict=True))
        return found + self.off.get(phase, 0.0)

    def corrected(self, lengths: Sequence[int], traced: Trace) -> MemoryModel:
        """Return the formula moved so that it gives what was traced at these lengths."""
        state = sum(traced.state.values())
        off = {p: traced.peaks[p] - state - replace(self, off={}).at(p, lengths) for p in self.rows}
        return replace(self, off=off)


def fit_memory_model(job: TrainingJob) -> MemoryModel:
    """Find a job's formula.

    Args:
        job: its `lengths` are not looked at.

    Raises:
        UsageError: as `Job.outline`.
    """
    try:
        return _solved(job, DEPTHS)
    except UsageError:
        # The method names layers that a model of two or three does not have.
        return _solved(job, (job.depth,))


def _solved(job: TrainingJob, depths: Sequence[int]) -> MemoryModel:
    first, *rest = depths
    models = {depth: replace(job, base=with_num_layers(job.base, depth)).outline() for depth in depths}
    columns, shapes = _asked(job, models[first])
    features = np.array([_features(lengths) for lengths in shapes], dtype=float)[:, columns]
    found = [_over(job, models[first], lengths) for lengths in shapes]
    # What hangs on tokens in evaluation, and nothing does in the optimizer's step, is asked of the first depth alone.
    more = [_over(job, models[depth], lengths, whole=i == 0) for depth in rest for i, lengths in enumerate(shapes)]
    rows: dict[str, tuple[float, ...]] = {}
    for phase in [p for p in PHASES if p in found[0]]:  # where no gradient comes, there is no way back
        y = np.array([over[phase] for over in found], dtype=float)
        beyond = [over[phase] - a for over, a in zip(more, y, strict=False) if phase in over]
        y[: len(beyond)] += [(job.depth - first) * each for each in beyond]
        if len(beyond) == 1:
            y[1:] += (job.depth - first) * beyond[0]
        solved = np.zeros(4)
        solved[columns] = np.linalg.solve(features, y)
        rows[phase] = tuple(map(float, solved))
    return MemoryModel(rows, {})


def extrapolate_layers(job: TrainingJob, model: Any = None) -> Trace:
    """Return what `trace` returns, from traces of the first layers; without events.

    Args:
        job: what is to run.
        model: the job's model on meta, where it was built already.

    Raises:
        UsageError: as `Job.outline`.
    """
    model = job.outline() if model is None else model
    block = BLOCK.get(job.device, 1)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in all_tensors(model)}
    state = sum(-(-size // block) * block for size in sizes.values())
    if job.depth <= max(DEPTHS):
        return trace_memory(job, model)
    try:
        few, more = (trace_memory(replace(job, base=with_num_layers(job.base, d))) for d in DEPTHS)
    except UsageError:
        return trace_memory(job, model)

    def on(a: float, b: float) -> int:
        return round(a + (job.depth - DEPTHS[0]) * (b - a) / (DEPTHS[1] - DEPTHS[0]))

    def table(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[Any, int]:
        return {key: on(a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

    held = table(few.state, more.state)
    if held["weights"] + held.get("adapters", 0) != state:  # layers differ
        return trace_memory(job, model)
    phases = {phase: table(few.phases[phase], more.phases[phase]) for phase in few.phases}
    return Trace(held, phases, Counter(table(few.work, more.work)), [], on(few.host, more.host))


def _asked(job: TrainingJob, model: Any) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return which features matter to a job, and as many lengths of rows, which tell them apart."""
    n = max(TOKENS, 2 * min(job.tile or 0, MAX_SEGMENT_TOKENS // 4))  # so many that they lie in tiles
    columns: list[int] = [0, 1]
    shapes: list[tuple[int, ...]] = [(n,), (2 * n,)]
    if job.device == "cuda" and job.packing:
        columns, shapes = [*columns, 2], [*shapes, (n + n // 2,)]
    if (
        not job.packing
        or packing_unsupported_reason(model)
        or original_attention(model.config._attn_implementation) != "sdpa"
    ):
        columns, shapes = [*columns, 3], [*shapes, (n, n)]
    return columns, shapes


def _features(lengths: Sequence[int]) -> tuple[float, ...]:
    tokens = sum(lengths)
    return (
        1.0,
        tokens,
        tokens if len(lengths) == 1 and tokens > MAX_SEGMENT_TOKENS else padded_length(tokens),
        sum(n * n for n in lengths),
    )


def _over(job: TrainingJob, model: Any, lengths: tuple[int, ...], *, whole: bool = True) -> dict[str, int]:
    """Return the bytes beside the state in each phase, and the model as it was."""
    with restore_module(model):
        traced = trace_memory(replace(job, lengths=lengths), model, whole=whole, counted=False)
    state = sum(traced.state.values())
    return {phase: peak - state for phase, peak in traced.peaks.items()}


def with_num_layers(config: Any, depth: int) -> Any:
    """Return a config with only so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config
