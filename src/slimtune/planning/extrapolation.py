"""Extrapolate from models of few layers to all layers, and from a few lengths to any length.

Layers are alike, or of a few kinds (attention and Mamba, with experts and without), and so are tokens, so what a phase
of the step takes beside the state is, with layers of one kind

    bytes = (a + a' d) + (b + b' d) T + (c + c' d) F + (e + e' d) S      d layers, T tokens, S = Σ (tokens of a row)²

F is T padded to a power of two, which matters where flex attention runs (not for one very long row). S matters where
attention keeps its scores. The coefficients follow from traces at as many lengths as there are features. The formula is
exact up to the rounding of allocations and, on a CPU, 1 MB for the mask of rows of 128 to 2,048 tokens. Below the size
of an MLP tile, and of a chunk of logits, it is an upper bound.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.attention.attention_functions import get_original_attention_name, layout_unsupported_reason_or_empty
from ..core.attention.packed_attention import MAX_SEGMENT_TOKENS, round_up_to_power_of_two_blocks
from ..core.data.example_lengths import ExampleLength, count_tokens_per_row
from ..core.foundation.device import simulating_device_for_kernel_choice
from ..core.kernels.cross_entropy import count_rows_per_logit_chunk
from ..core.models.base_config import get_max_positions
from ..errors import UsageError
from .fake_tensors import list_module_tensors
from .memory_trace import ALLOCATION_BLOCK, FLOAT32_MERGE_PARAMS, StepTrace, trace_merge_peak, trace_training_step
from .packed_lengths import count_packed_tokens
from .plan_request import MicroBatchWorkload
from .trace_cache import load_or_compute_trace

TOKENS = 1024
"""Shortest pack that the formula is fitted to."""
MOST_TOKENS = 1 << 14
"""Most tokens that it is fitted to for the sake of a chunk of logits."""
_COMPUTES_DIFFERENTLY_FIELDS = ("activation_sparsity_pattern",)
"""Fields of configs with a number for each layer that does not show in the shapes of its weights."""


def extrapolate_step_trace(
    job: MicroBatchWorkload, full_meta_model: Any = None, *, stop_after_backward: bool = False
) -> StepTrace:
    """Return the trace of a job, computed from traces of few of its layers: of two and of three if all are alike.

    A model of up to three layers is traced whole. So is one whose targets are not in those layers, and one whose
    weights are not what those of the few layers make.

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

    if not (samples := _list_layer_samples(job)):
        return trace(job, full_meta_model)
    try:
        traces = [(factor, trace(sample)) for factor, sample in samples]
    except UsageError:
        return trace(job, full_meta_model)

    def extrapolate(get_values: Callable[[StepTrace], Mapping[Any, int]]) -> dict[Any, int]:
        values = [(factor, get_values(traced)) for factor, traced in traces]
        keys = dict.fromkeys(key for _, some in values for key in some)
        return {key: sum(factor * some.get(key, 0) for factor, some in values) for key in keys}

    state = extrapolate(lambda traced: traced.state_bytes_by_part)
    whole = state["weights"] + state.get("adapters", 0)
    if full_meta_model is not None and whole != count_allocated_model_bytes(full_meta_model, job.device):
        return trace(job, full_meta_model)
    phases = {}
    for phase in traces[0][1].bytes_by_phase_and_part:
        phases[phase] = extrapolate(partial(_get_phase, phase))
    return StepTrace(
        state,
        phases,
        Counter(extrapolate(lambda traced: traced.counts_by_operator_cost)),
        Counter(extrapolate(lambda traced: traced.attention_flops_by_dtype)),
        sum(factor * traced.host_bytes for factor, traced in traces),
    )


def count_allocated_model_bytes(meta_model: Any, device: str) -> int:
    """Return what the weights and adapters of a model on meta take on a kind of device."""
    block = ALLOCATION_BLOCK.get(device, 1)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in list_module_tensors(meta_model)}
    return sum(-(-size // block) * block for size in sizes.values())


def extrapolate_allocated_model_bytes(job: MicroBatchWorkload) -> int:
    """Return what weights and adapters of a job take, from models of few of its layers; exact if the step's are."""
    samples = _list_layer_samples(job)
    try:
        sizes = [(factor, count_allocated_model_bytes(few.build_model(), job.device)) for factor, few in samples]
    except UsageError:  # its targets are not in those layers
        sizes = []
    if not sizes:
        return count_allocated_model_bytes(job.build_model(), job.device)
    return sum(factor * size for factor, size in sizes)


def _get_phase(phase: str, traced: StepTrace) -> dict[str, int]:
    return traced.bytes_by_phase_and_part[phase]


def find_layer_kinds(job: MicroBatchWorkload, model: Any) -> tuple[int, ...]:
    """Return a number for each layer of a job's model, the same for layers whose weights have the same shapes.

    () if all layers are alike. If a base of some of the layers would not have these layers, each is a kind of its own,
    so that the base is traced whole.
    """
    if (shapes := _list_layer_shapes(model, job.num_layers)) is None:
        return ()
    text = job.base_config.get_text_config()
    numbers = (getattr(text, name, None) or [None] * len(shapes) for name in _COMPUTES_DIFFERENTLY_FIELDS)
    settings = [*zip(shapes, *numbers, strict=True)]
    if len(different := [*dict.fromkeys(settings)]) == 1:
        return ()
    kinds = tuple(map(different.index, settings))
    if samples := _choose_layers(kinds):
        _, indices = samples[0]
        with suppress(Exception):  # a config that cannot have these layers fails in transformers' code in many ways
            few = _list_layer_shapes(job.with_layers(indices).build_model(), len(indices))
            if few == [shapes[i] for i in indices]:
                return kinds
    return tuple(range(len(shapes)))


def _list_layer_shapes(model: Any, num_layers: int) -> list[Any] | None:
    """Return names and shapes of the weights and buffers of each layer; None if the layers are not found."""
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == num_layers
        if is_list and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            tensors = ((*layer.named_parameters(), *layer.named_buffers()) for layer in module)
            return [tuple((name, tuple(tensor.shape)) for name, tensor in layer) for layer in tensors]
    return None


def _list_layer_samples(job: MicroBatchWorkload) -> list[tuple[int, MicroBatchWorkload]]:
    """Return jobs of few layers, and factors by which what they take adds up to what all layers take.

    [] if the job is to be traced whole.
    """
    if job.num_layers <= 3:
        return []
    if job.layer_kinds:
        return [(factor, job.with_layers(indices)) for factor, indices in _choose_layers(job.layer_kinds)]
    return [(3 - job.num_layers, job.with_num_layers(2)), (job.num_layers - 2, job.with_num_layers(3))]


def _choose_layers(kinds: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return places of layers, and the factors of `_list_layer_samples`; [] if the whole base is not more to trace.

    The first sample has the first layer, the last one, and the last of each other kind, because a step takes most
    memory at the first or the last layer, or at the most expensive kind between them. Each other sample has one more
    layer of a kind: its first, which stands before that most expensive one as nearly all others do.
    """
    common = {0, *(max(i for i, other in enumerate(kinds) if other == kind) for kind in kinds)}
    if len(common) == 2:  # the phase between those of the first and the last layer needs a layer
        common.add(max(i for i in range(len(kinds) - 1) if kinds[i] == kinds[-1]))
    samples = [(1, sorted(common))]
    for kind in dict.fromkeys(kinds):
        others = [i for i, other in enumerate(kinds) if other == kind and i not in common]
        if others:
            samples.append((len(others), sorted({*common, others[0]})))
    samples[0] = (1 - sum(factor for factor, _ in samples[1:]), samples[0][1])
    return samples if sum(len(indices) for _, indices in samples) < len(kinds) else []


def extrapolate_merge_cpu_peak(job: MicroBatchWorkload, num_params: int) -> int | None:
    """Return the peak bytes of CPU memory while the adapter is merged into a base; None if it cannot be merged."""
    dtype = torch.float32 if num_params < FLOAT32_MERGE_PARAMS else job.dtype

    def trace(job: MicroBatchWorkload) -> int | None:
        return load_or_compute_trace(job, partial(trace_merge_peak, job, dtype), dtype=dtype)

    if not (samples := _list_layer_samples(job)):
        return trace(job)
    try:
        peaks = [(factor, trace(sample)) for factor, sample in samples]
    except UsageError:
        return trace(job)
    return None if any(peak is None for _, peak in peaks) else sum(factor * (peak or 0) for factor, peak in peaks)


@dataclass(frozen=True)
class MemoryFormula:
    """A formula for the memory of a job at any lengths.

    Args:
        state: bytes that are always allocated.
        coefficients: for each phase the factors of the features `[1, T, F, S]`.
        corrections: for each phase the bytes that a trace took more than the formula gives.
        corrected_tokens: of that trace. More tokens may fill an MLP tile or a chunk of logits that this trace did not,
            so that they take no fewer bytes than the formula gives.
        shared_prefix_tokens: that all examples begin with.
    """

    state: int
    coefficients: dict[str, np.ndarray]
    traced_excess_bytes: dict[str, float] = field(default_factory=dict)
    traced_tokens: int = 0
    shared_prefix_tokens: int = 0

    def peak(self, lengths: Sequence[ExampleLength]) -> int:
        """Return the highest number of bytes in a micro-batch of examples of these lengths."""
        features = _features(lengths, self.shared_prefix_tokens)
        least = 0.0 if features[1] > self.traced_tokens else -np.inf
        shifts = {phase: max(least, shift) for phase, shift in self.traced_excess_bytes.items()}
        above = (float(c @ features) + shifts.get(phase, 0.0) for phase, c in self.coefficients.items())
        return self.state + int(max(0.0, *above))

    def correct(self, lengths: Sequence[ExampleLength], trace: StepTrace) -> Self:
        """Return the formula shifted so that it gives what was traced at these lengths."""
        features = _features(lengths, self.shared_prefix_tokens)
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
    # The job's own lengths are traced whole: the plan needs that trace, too, and finds it kept.
    traces = [
        extrapolate_step_trace(replace(job, lengths=lengths), stop_after_backward=lengths != job.lengths)
        for lengths in shapes
    ]
    features = np.array([_features(lengths, job.shared_prefix_tokens) for lengths in shapes])[:, columns]
    coefficients = {}
    partial_trace = min(traces, key=lambda trace: len(trace.bytes_by_phase_and_part))
    for phase in partial_trace.bytes_by_phase_and_part:  # without those of the optimizer and the evaluation
        solution = np.zeros(4)
        solution[columns] = np.linalg.solve(features, [t.peaks[phase] - t.state_bytes for t in traces])
        coefficients[phase] = solution
    return MemoryFormula(traces[0].state_bytes, coefficients, shared_prefix_tokens=job.shared_prefix_tokens)


def _split_row(tokens: int, longest: int) -> tuple[int, ...]:
    """Return the lengths of rows with so many tokens together, none longer than `longest`."""
    whole, rest = divmod(tokens, longest)
    return (*[longest] * whole, *[rest] * (rest > 0))


def _features(lengths: Sequence[ExampleLength], shared_prefix_tokens: int) -> np.ndarray:
    tokens = count_packed_tokens(lengths, shared_prefix_tokens)
    rows = [n for length in lengths for n in count_tokens_per_row(length)]
    one_long_row = len(rows) == 1 and tokens > MAX_SEGMENT_TOKENS
    return np.array(
        [1, tokens, tokens if one_long_row else round_up_to_power_of_two_blocks(tokens), sum(n * n for n in rows)],
        float,
    )
