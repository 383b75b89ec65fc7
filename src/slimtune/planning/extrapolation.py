"""Extrapolate from models of two and three layers to all layers, and from a few lengths to any length.

Layers are alike, and so are tokens, so what a phase of the step takes beside the state is

    bytes = (a + a' d) + (b + b' d) T + (c + c' d) F + (e + e' d) S      d layers, T tokens, S = Σ (tokens of a row)²

F is T padded to a power of two, which matters where flex attention runs (not for one very long row). S matters where
attention keeps its scores. The coefficients follow from traces at as many lengths as there are features. The formula is
exact up to the rounding of allocations and, on a CPU, 1 MB for the mask of rows of 128 to 2,048 tokens. Below the size
of an MLP tile, and of a chunk of logits, it is an upper bound.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from ..core.attention.attention_functions import get_original_attention_name, layout_unsupported_reason_or_empty
from ..core.attention.packed_attention import MAX_SEGMENT_TOKENS, round_up_to_power_of_two_blocks
from ..core.data.example_lengths import ExampleLength, count_tokens_per_row
from ..core.foundation.device import simulating_device_for_kernel_choice
from ..core.kernels.cross_entropy import count_rows_per_logit_chunk
from ..core.models.base_config import get_max_positions
from ..errors import UsageError
from .fake_tensors import list_module_tensors
from .memory_trace import ALLOCATION_BLOCK, FLOAT32_MERGE_PARAMS, StepTrace, trace_merge_peak, trace_training_step
from .packed_lengths import count_tokens_with_shared_prompt
from .plan_request import MicroBatchWorkload
from .trace_cache import load_or_compute_trace

TOKENS = 1024
"""Shortest pack that the formula is fitted to."""
MOST_TOKENS = 1 << 14
"""Most tokens that it is fitted to for the sake of a chunk of logits."""


def extrapolate_step_trace(
    job: MicroBatchWorkload, full_meta_model: Any = None, *, stop_after_backward: bool = False
) -> StepTrace:
    """Return the trace of a job, computed from traces of its first two and three layers.

    A model of up to three layers is traced whole. So is one whose targets are not in those layers, and one whose
    weights do not grow evenly with the layers.

    Args:
        job: what to train.
        full_meta_model: the job's model on meta, to check the extrapolated weights against; it may be used up.
        stop_after_backward: as in `trace_training_step`.

    Raises:
        UsageError: the targets match nothing.
    """

    def trace(job: MicroBatchWorkload, model: Any = None) -> StepTrace:
        traced = partial(trace_training_step, job, model, stop_after_backward=stop_after_backward)
        return load_or_compute_trace(job, traced, backward_only=stop_after_backward)

    if job.num_layers <= 3:
        return trace(job, full_meta_model)
    try:
        two, three = (trace(job.with_num_layers(d)) for d in (2, 3))
    except UsageError:
        return trace(job, full_meta_model)

    def extrapolate(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
        return {key: _at_depth(job, a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

    state = extrapolate(two.state_bytes_by_part, three.state_bytes_by_part)
    if full_meta_model is not None:
        block = ALLOCATION_BLOCK.get(job.device, 1)
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in list_module_tensors(full_meta_model)}
        if state["weights"] + state.get("adapters", 0) != sum(-(-size // block) * block for size in sizes.values()):
            return trace(job, full_meta_model)
    phases = {
        phase: extrapolate(two.bytes_by_phase_and_part[phase], three.bytes_by_phase_and_part[phase])
        for phase in two.bytes_by_phase_and_part
    }
    return StepTrace(
        state,
        phases,
        Counter(extrapolate(two.counts_by_operator_cost, three.counts_by_operator_cost)),
        Counter(extrapolate(two.attention_flops_by_dtype, three.attention_flops_by_dtype)),
        _at_depth(job, two.host_bytes, three.host_bytes),
    )


def extrapolate_merge_cpu_peak(job: MicroBatchWorkload, num_params: int) -> int | None:
    """Return the peak bytes of CPU memory while the adapter is merged into a base; None if it cannot be merged."""
    dtype = torch.float32 if num_params < FLOAT32_MERGE_PARAMS else job.dtype

    def trace(job: MicroBatchWorkload) -> int | None:
        return load_or_compute_trace(job, partial(trace_merge_peak, job, dtype), dtype=dtype)

    if job.num_layers <= 3:
        return trace(job)
    try:
        two, three = (trace(job.with_num_layers(d)) for d in (2, 3))
    except UsageError:
        return trace(job)
    return None if two is None or three is None else _at_depth(job, two, three)


def _at_depth(job: MicroBatchWorkload, two: int, three: int) -> int:
    return two + (job.num_layers - 2) * (three - two)


@dataclass(frozen=True)
class MemoryFormula:
    """A formula for the memory of a job at any lengths.

    Args:
        state: bytes that are always allocated.
        coefficients: for each phase the factors of the features `[1, T, F, S]`.
        corrections: for each phase the bytes that a trace took more than the formula gives.
        corrected_tokens: of that trace. More tokens may fill an MLP tile or a chunk of logits that this trace did not,
            so that they take no fewer bytes than the formula gives.
    """

    state: int
    coefficients: dict[str, np.ndarray]
    traced_excess_bytes: dict[str, float] = field(default_factory=dict)
    traced_tokens: int = 0

    def peak(self, lengths: Sequence[ExampleLength]) -> int:
        """Return the highest number of bytes in a micro-batch of examples of these lengths."""
        features = _features(lengths)
        least = 0.0 if features[1] > self.traced_tokens else -np.inf
        shifts = {phase: max(least, shift) for phase, shift in self.traced_excess_bytes.items()}
        above = (float(c @ features) + shifts.get(phase, 0.0) for phase, c in self.coefficients.items())
        return self.state + int(max(0.0, *above))

    def correct(self, lengths: Sequence[ExampleLength], trace: StepTrace) -> Self:
        """Return the formula shifted so that it gives what was traced at these lengths."""
        features = _features(lengths)
        above = {phase: trace.peaks[phase] - trace.state_bytes for phase in self.coefficients}
        shifts = {phase: above[phase] - float(c @ features) for phase, c in self.coefficients.items()}
        return replace(self, state=trace.state_bytes, traced_excess_bytes=shifts, traced_tokens=int(features[1]))


def fit_memory_formula(job: MicroBatchWorkload, model: Any) -> MemoryFormula:
    """Fit the formula of a job, whose model on meta is only read.

    If the job's examples have a suitable length, one of the traces is of them, and whole: the job needs that one, too.
    """
    # At least two MLP tiles, and two chunks of logits: as a third one is computed, nothing is left of the first.
    with simulating_device_for_kernel_choice(job.device):
        chunk = count_rows_per_logit_chunk(job.base_config.get_text_config().vocab_size, torch.device("cpu"))
    two_chunks = math.ceil(2 * chunk / job.supervised)
    tokens = max(TOKENS, 2 * min(job.mlp_tile_size or 0, MAX_SEGMENT_TOKENS // 4))
    if two_chunks <= MOST_TOKENS:  # a small vocabulary's chunk is longer than most micro-batches
        tokens = max(tokens, two_chunks)
    # Padded rows of unequal lengths would not follow the formula, which counts no padding.
    own = job.packing and tokens <= job.micro_batch_tokens <= 2 * tokens
    tokens = job.micro_batch_tokens if own else tokens
    longest = get_max_positions(job.base_config) or 2 * tokens
    attention = get_original_attention_name(model.config._attn_implementation)
    by_row = not job.packing or layout_unsupported_reason_or_empty(model) or attention != "sdpa"
    columns: list[int] = [0, 1]
    shapes = [job.lengths if own else _split_row(tokens, longest), _split_row(2 * tokens, longest)]
    if job.device == "cuda" and job.packing:
        columns.append(2)
        shapes.append(_split_row(tokens + tokens // 2, longest))
    if by_row:
        columns.append(3)
        shapes.append(_split_row(2 * tokens, min(tokens, longest // 2)))
    traces = [
        extrapolate_step_trace(replace(job, lengths=lengths), stop_after_backward=lengths is not job.lengths)
        for lengths in shapes
    ]
    features = np.array([_features(lengths) for lengths in shapes])[:, columns]
    coefficients = {}
    for phase in traces[1].bytes_by_phase_and_part:  # without those of the optimizer and the evaluation
        solution = np.zeros(4)
        solution[columns] = np.linalg.solve(features, [t.peaks[phase] - t.state_bytes for t in traces])
        coefficients[phase] = solution
    return MemoryFormula(traces[0].state_bytes, coefficients)


def _split_row(tokens: int, longest: int) -> tuple[int, ...]:
    """Return the lengths of rows with so many tokens together, none longer than `longest`."""
    whole, rest = divmod(tokens, longest)
    return (*[longest] * whole, *[rest] * (rest > 0))


def _features(lengths: Sequence[ExampleLength]) -> np.ndarray:
    tokens = sum(map(count_tokens_with_shared_prompt, lengths))
    rows = [n for length in lengths for n in count_tokens_per_row(length)]
    one_long_row = len(rows) == 1 and tokens > MAX_SEGMENT_TOKENS
    return np.array(
        [1, tokens, tokens if one_long_row else round_up_to_power_of_two_blocks(tokens), sum(n * n for n in rows)],
        float,
    )
