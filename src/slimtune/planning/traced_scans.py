"""Scans of recurrent layers as one operator of a trace, in place of the thousands that they run.

Without kernels of their own, layers of Mamba and of the gated delta rule go through a row in chunks of tokens: 16,000
tokens of Qwen3.5 9B take more than 200,000 operators. What a scan takes follows from shapes, and grows with the number
of chunks. So it is traced on rows of three, four and five chunks, forward and backward, and `_TracedScan` stands in for
it: it holds as many bytes for as long, and counts as many operators of as much work.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from .memory_tracker import MemoryTracker

SCANS = {
    "torch_chunk_gated_delta_rule": (1, 64),
    "chunk_kimi_delta_attention": (1, 64),
    "mamba2_chunk_scan": (1, 256),
    "mamba_selective_scan": (-1, 8),
}
"""The functions of transformers' models: the dimension of tokens in arguments of at least three dimensions, and the
tokens of a chunk where the call does not say it. A scan of single tokens is linear in chunks of any number of them."""
TRACED_CHUNKS = (4, 6, 8)
"""Chunks of the rows that a scan is traced on."""


_TRACES: dict[Any, dict[int, "_ScanTrace"]] = defaultdict(dict)
"""What was traced in this process, by the function and all of its arguments but the number of tokens, and by chunks."""


class _OperatorKind(NamedTuple):
    dtype: torch.dtype
    is_product: bool


@dataclass(frozen=True)
class _PassCosts:
    """What a forward or a backward pass of a scan takes, beside its arguments and the gradients that it is given."""

    peak_bytes: float
    saved_bytes: float  # of a forward pass, for the backward pass
    work: dict[_OperatorKind, list[float]]  # operators, FLOPs, and bytes moved


@dataclass(frozen=True)
class _ScanTrace:
    """A scan that was traced on a short row."""

    forward: _PassCosts
    forward_peak_without_gradient: float
    backward: _PassCosts
    saves_argument: list[bool]  # of each tensor among the arguments
    outputs: list[Any]  # shape and dtype of tensors; other values as they are
    output_structure: Any


def _extrapolate(chunks: int, costs: Sequence[_PassCosts]) -> _PassCosts:
    """Return the costs at a number of chunks from those at `TRACED_CHUNKS`: all by a line, the traffic by a parabola.

    The gradient of a slice of a tensor is a tensor of its whole size, so the traffic of all slices grows with the
    square of their number.
    """
    a, b, c = TRACED_CHUNKS

    def line(_: float, y: float, z: float) -> float:
        return max(0.0, y + (z - y) * (chunks - b) / (c - b))

    def parabola(x: float, y: float, z: float) -> float:
        x *= (chunks - b) * (chunks - c) / ((a - b) * (a - c))
        y *= (chunks - a) * (chunks - c) / ((b - a) * (b - c))
        return max(0.0, x + y + z * (chunks - a) * (chunks - b) / ((c - a) * (c - b)))

    kinds = dict.fromkeys(kind for cost in costs for kind in cost.work)
    work = {}
    for kind in kinds:
        operators, flops, moved = zip(*(cost.work.get(kind, [0.0] * 3) for cost in costs), strict=True)
        work[kind] = [line(*operators), line(*flops), parabola(*moved)]
    return _PassCosts(
        line(*(cost.peak_bytes for cost in costs)), line(*(cost.saved_bytes for cost in costs)), work
    )  # fmt: skip


class _ScanRun(NamedTuple):
    """One call of a scan: what `_TracedScan` allocates and counts."""

    tracker: MemoryTracker
    forward: _PassCosts
    backward: _PassCosts
    saves_argument: list[bool]
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    is_dropped: bool  # whether checkpointing drops what is saved, and runs the scan again in the backward pass

    def count_work(self, costs: _PassCosts) -> None:
        """Count the operators of a pass, each as the mean of its kind."""
        if self.tracker.count_operators:
            for kind, (operators, flops, moved) in costs.work.items():
                if (number := round(operators)) > 0:
                    mean = (round(flops / number), round(moved / number), kind.dtype)
                    self.tracker.counts_by_operator_cost[mean] += number


class _TracedScan(torch.autograd.Function):
    """Allocates what a scan would, and returns outputs and gradients of its shapes."""

    @staticmethod
    def forward(ctx: Any, run: _ScanRun, *arguments: Tensor) -> Any:
        _allocate(run.forward.peak_bytes)
        # What checkpointing drops after the forward pass takes no memory in it, but has the shape of what it computes
        # again.
        size = round(run.forward.saved_bytes)
        saved = torch.empty(1, dtype=torch.uint8).expand(size) if run.is_dropped else _allocate(size)
        ctx.run = run
        ctx.save_for_backward(
            saved, *(t for t, is_saved in zip(arguments, run.saves_argument, strict=True) if is_saved)
        )
        ctx.shapes = [(t.shape, t.dtype) for t in arguments]
        run.count_work(run.forward)
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in run.outputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        run, _ = ctx.run, ctx.saved_tensors
        _allocate(max(0.0, run.backward.peak_bytes - run.forward.saved_bytes))
        run.count_work(run.backward)
        needed = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return (None, *(torch.empty(shape, dtype=dtype) if is_needed else None for (shape, dtype), is_needed in needed))


def _is_checkpointed_forward() -> bool:
    """Return whether hooks take what autograd saves, outside of a backward pass."""
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return has_hooks and torch._C._current_graph_task_id() == -1


def _identity(value: Tensor) -> Tensor:
    return value


def _allocate(size: float) -> Tensor:
    return torch.empty(round(size), dtype=torch.uint8)


@contextmanager
def tracing_scans_as_one_operator(tracker: MemoryTracker) -> Iterator[None]:
    """Replace the scans of `SCANS` in transformers' loaded models, inside `fake_tensor_mode` and the tracker."""
    replaced: list[tuple[Any, str, Any]] = []
    for path, module in list(sys.modules.items()):
        if path.startswith("transformers.models.") and ".modeling_" in path:
            replaced += [(module, name, vars(module)[name]) for name in SCANS if name in vars(module)]
    for module, name, original in replaced:
        setattr(module, name, partial(_run_scan, original, *SCANS[name], tracker))
    try:
        yield
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def _run_scan(
    original: Callable[..., Any], dim: int, default_chunk: int, tracker: MemoryTracker, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run a scan as one operator; as it is if the row is short."""
    values, structure = tree_flatten((args, kwargs))
    tokens = args[0].shape[dim]
    chunk = int(kwargs.get("chunk_size") or default_chunk)
    if tokens <= max(TRACED_CHUNKS) * chunk:
        return original(*args, **kwargs)
    with_gradient = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)

    def has_tokens(value: Tensor) -> bool:
        return value.dim() >= 3 and value.shape[dim] == tokens

    def shorten(value: Any, length: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [*value.shape]
        if has_tokens(value):
            shape[dim] = length
        leaf = torch.empty(shape, dtype=value.dtype, requires_grad=with_gradient and value.requires_grad)
        return leaf.mul(1)  # a tensor that lives on only if the scan saves it

    def describe(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        shape = [*value.shape]
        if has_tokens(value):
            shape[dim] = -1
        return tuple(shape), value.dtype, value.requires_grad

    key = (original, tracker.block, with_gradient, str(structure), str([describe(value) for value in values]))
    known = _TRACES[key]
    # The fewest chunks are for the parabola of the traffic alone.
    for n in TRACED_CHUNKS if tracker.count_operators else TRACED_CHUNKS[1:]:
        if n not in known:
            tracker.paused = True
            try:
                shortened = [shorten(v, n * chunk) for v in values]
                known[n] = _trace_scan(original, shortened, structure, tracker, with_gradient=with_gradient)
            finally:
                tracker.paused = False
    found, chunks = [known.get(n, known[TRACED_CHUNKS[1]]) for n in TRACED_CHUNKS], math.ceil(tokens / chunk)
    outputs = [_lengthen(a, b, tokens) for a, b in zip(found[-2].outputs, found[-1].outputs, strict=True)]
    forward = _extrapolate(chunks, [trace.forward for trace in found])
    is_dropped = with_gradient and _is_checkpointed_forward()
    if is_dropped:
        peaks = [replace(t.forward, peak_bytes=t.forward_peak_without_gradient) for t in found]
        forward = replace(forward, peak_bytes=_extrapolate(chunks, peaks).peak_bytes)
    run = _ScanRun(
        tracker,
        forward,
        _extrapolate(chunks, [trace.backward for trace in found]),
        found[-1].saves_argument,
        [output for output in outputs if isinstance(output, tuple)],
        is_dropped,
    )
    made = iter(_TracedScan.apply(run, *(v for v in values if isinstance(v, Tensor))))
    return tree_unflatten([next(made) if isinstance(o, tuple) else o for o in outputs], found[-1].output_structure)


def _lengthen(shorter: Any, longer: Any, tokens: int) -> Any:
    """Return shape and dtype of an output for a row of `tokens`, from those for two shorter rows."""
    if not isinstance(longer, tuple):
        return longer
    (few, dtype), (more, _) = shorter, longer
    return tuple(size if size == least else tokens for least, size in zip(few, more, strict=True)), dtype


def _trace_scan(
    original: Callable[..., Any], values: list[Any], structure: Any, outer: MemoryTracker, *, with_gradient: bool
) -> _ScanTrace:
    """Trace a scan on arguments that nothing else holds; it empties `values`."""
    tracker = MemoryTracker(outer.block, count_operators=True, find_result=outer.find_result)
    tensors = [value for value in values if isinstance(value, Tensor)]
    sources: list[Any] = [t.grad_fn.next_functions[0][0] for t in tensors if t.grad_fn is not None]
    # Hooks of checkpointing around the scan must not see what is saved here.
    with tracker, torch.set_grad_enabled(with_gradient), saved_tensors_hooks(_identity, _identity):
        for i, tensor in enumerate(tensors):
            tracker.assign([tensor], f"argument {i}")
        args, kwargs = tree_unflatten(values, structure)
        tracker.start_phase("without gradient")
        with torch.no_grad():
            original(*args, **kwargs)
        tracker.counts_by_operator_cost.clear()
        tracker.start_phase("forward")
        outputs, output_structure = tree_flatten(original(*args, **kwargs))
        count, described = len(tensors), [(tuple(o.shape), o.dtype) if isinstance(o, Tensor) else o for o in outputs]
        peak = tracker.phases.get("forward", {}).get("activations", 0)
        values.clear()
        del args, kwargs, tensors
        tracker.assign((o for o in outputs if isinstance(o, Tensor)), "outputs")
        saved = tracker.live["activations"]
        saves_argument = [tracker.live[f"argument {i}"] > 0 for i in range(count)]
        forward = _PassCosts(peak, saved, _sum_work(tracker.counts_by_operator_cost))
        tracker.counts_by_operator_cost.clear()
        tracker.start_phase("backward")
        trained = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        gradients = [torch.empty_like(o) for o in trained]
        tracker.assign(gradients, "outputs")
        tracker.counts_by_operator_cost.clear()
        if trained:
            torch.autograd.grad(trained, [leaf.variable for leaf in sources], gradients, allow_unused=True)
    peak = max(saved, tracker.phases.get("backward", {}).get("activations", 0))
    backward = _PassCosts(peak, 0, _sum_work(tracker.counts_by_operator_cost))
    without = tracker.phases.get("without gradient", {}).get("activations", 0)
    return _ScanTrace(forward, without, backward, saves_argument, described, output_structure)


def _sum_work(counts: Mapping[tuple[int, int, torch.dtype], int]) -> dict[_OperatorKind, list[float]]:
    """Return operators, FLOPs and bytes moved, by kind of operator."""
    work: dict[_OperatorKind, list[float]] = defaultdict(lambda: [0.0] * 3)
    for (flops, moved, dtype), number in counts.items():
        sums = work[_OperatorKind(dtype, flops > 0)]
        for i, value in enumerate((1, flops, moved)):
            sums[i] += number * value
    return dict(work)
