"""Plan a run on a GPU before any weight is loaded: memory, verdict, largest lengths, speed, and advice.

request → model on meta → memory formula → micro-batches → trace → allocator range → verdict → advice
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..core.adapters.adapter_files import get_adapter_tensors_and_metadata
from ..core.adapters.quantized_layers import count_trainable_and_all_parameters
from ..core.attention.attention_functions import packing_unsupported_reason_or_empty
from ..core.data.example_lengths import (
    ExampleLength,
    count_tokens_per_row,
)
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.formatting import format_bytes
from ..core.models.base_config import get_max_positions
from ..core.models.quantization import get_stored_quantization
from ..core.training.loss import make_collator
from ..errors import ModelError, SlimtuneError, is_out_of_memory
from ..extras.integer_checkpoints import METHODS
from ..extras.quantized_weight import QuantizedWeight
from .extrapolation import (
    MemoryFormula,
    count_allocated_model_bytes,
    extrapolate_allocated_model_bytes,
    extrapolate_merge_cpu_peak,
    extrapolate_step_trace,
    find_layer_kinds,
    fit_memory_formula,
)
from .fake_quantization import KINDS
from .gpu_specs import GpuSpec
from .interval import Interval
from .memory_trace import StepTrace, apply_sharding_savings, estimate_sharding_savings_and_uncertainty
from .packed_lengths import (
    count_packed_tokens,
    count_tokens_with_shared_prompt,
    remove_prefix_sharing,
    resize_example_rows,
)
from .plan_request import MAX_SEQ_LEN, MicroBatchWorkload, PlanRequest, pick_length_quantiles
from .plan_result import PARTS, Advice, MemorySaving, MemoryVerdict, ResourceEstimate, TrainingWorkload
from .throughput import UTILIZATION, estimate_training_speed

RUNTIME = {"cuda": Interval(0.25e9, 0.75e9), "mps": Interval(0.2e9, 1.0e9), "cpu": Interval(0.45e9, 0.8e9)}
"""Bytes outside tensors: a CUDA context and loaded kernels; on a CPU, Python and its libraries."""
FRAGMENTATION = {"cuda": 0.12, "mps": 0.2, "cpu": 0.5}
"""Share of the temporary memory that an allocator may hold in addition, as lengths change from step to step."""
LIBRARY_WORKSPACES = 64e6
"""Bytes that matrix products may allocate."""
CUBLAS_WORKSPACES = 2 * 8_519_680
"""cuBLAS keeps a workspace for the forward and one for the backward thread (up to compute capability 8.9)."""
LIBRARY_BYTES = {"cuda": CUBLAS_WORKSPACES}
MAX_BATCH_SIZE = 1 << 16
SPLIT_MARGIN = 1.02
"""Factor on the formula's bytes when a batch is split into micro-batches."""
ADVISED_TILE_SIZE = 1024
"""An MLP tile of 1024 tokens computes as fast as a larger one and holds little beside a long row."""
TENSOR_HEADER, TOKENIZER_ENTRY, SMALL_FILES, FINGERPRINT_BYTES = 120, 150, 1 << 20, 3000
"""Bytes: of a safetensors header for each tensor; of `tokenizer.json` for each token at most (134 for Llama 3, 75 for
Qwen 2.5); of settings, random states and logs in a checkpoint, and again in the run folder; of what a run was trained
on, in the metadata of its adapter's file."""


def estimate_resources(request: PlanRequest, *, advise: Advice = "all") -> ResourceEstimate:
    """Plan one run.

    Args:
        request: the run.
        advise: which changes that save memory to look for if it does not surely fit; "first" stops at one that fits.

    Raises:
        UsageError: the targets match nothing, or the settings contradict each other.
        ModelError: the base cannot be planned: its training step depends on tensor values, or fails without them.
    """
    with _translating_planning_errors(request):
        return _estimate_resources(request, advise)


def judge_run(request: PlanRequest) -> MemoryVerdict:
    """Return the verdict of `estimate_resources` by one trace: a batch that is split fits if its longest row does."""
    with _translating_planning_errors(request):
        request, job, model, _ = _prepare_job(request)
        if request.fsdp or (len(job.lengths) > 1 and not request.split_batch):
            return _estimate_resources(request, "none").verdict
        job = split_batch_to_fit_if_possible(request, job, None)
        _, _, need = _estimate_need(request, job, extrapolate_step_trace(job, model))
        return judge_memory_fit(need, request.gpu.usable)


@contextmanager
def _translating_planning_errors(request: PlanRequest) -> Iterator[None]:
    # Collections of garbage would go through everything that was imported, again and again.
    gc.freeze()
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Code of transformers or of the base runs here on tensors without values, and may do anything with them.
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{request.model.name} cannot be planned: its training step fails on tensors that have shapes and no "
            f"values ({type(error).__name__}: {first_line})",
            "a base whose step needs only shapes",
            "`slimtune train` goes on without a plan",
        ) from error
    finally:
        gc.unfreeze()


def _prepare_job(request: PlanRequest) -> tuple[PlanRequest, MicroBatchWorkload, Any, list[str]]:
    """Return request and job as training would run them, the job's model on meta, and notes about packing."""
    job = request.job()
    model = job.build_model()
    job = replace(job, layer_kinds=find_layer_kinds(job, model))
    packing_notes = []
    if job.packing and (reason := packing_unsupported_reason_or_empty(model)):
        job = replace(job, packing=False)
        packing_notes.append(f"Rows of this base are padded, not packed, in training too: {reason}.")
    if not make_collator(model, 0, packing=job.packing).share_prefix:
        job = replace(job, lengths=tuple(map(remove_prefix_sharing, job.lengths)), shared_prefix_tokens=0)
        content = request.content._replace(shared_prefix_tokens=0)
        request = replace(request, quantiles=tuple(map(remove_prefix_sharing, request.quantiles)), content=content)
    return request, job, model, packing_notes


def _estimate_need(
    request: PlanRequest, job: MicroBatchWorkload, trace: StepTrace, sharding_spread: float = 0.0
) -> tuple[int, Interval, Interval]:
    """Return the peak of allocated bytes, the bytes that the allocator reserves, and what the run needs."""
    peak, reserved = estimate_peak_allocated_and_reserved(job, trace)
    reserved = Interval(reserved.low, reserved.high + sharding_spread)
    sampling = max(0, trace.state_bytes + request.sampling_bytes - peak) if request.sampling_bytes else 0
    more = sampling + request.teacher_bytes
    reserved = Interval(reserved.low + more, reserved.high + more)
    return peak + more, reserved, reserved + RUNTIME[job.device]


def _estimate_resources(request: PlanRequest, advise: Advice) -> ResourceEstimate:
    gpu, positions = request.gpu, get_max_positions(request.model.config)
    request, job, model, packing_notes = _prepare_job(request)
    trainable_params, total_params = count_trainable_and_all_parameters(model)
    adapter_bytes, extra_bytes, at_most = estimate_adapter_file_and_method_state_sizes(model)
    saved, spread = estimate_sharding_savings_and_uncertainty(model, request.processes) if request.fsdp else (0, 0)
    # No length fits where weights and adapters alone are more than the card has: then a formula is not fitted.
    model_bytes = count_allocated_model_bytes(model, job.device) - saved
    memory_model = None
    if model_bytes + RUNTIME[job.device].low <= gpu.usable.high:
        # Beside a base of more than half the card few examples fit: one of the formula's traces is then the plan's.
        one = split_batch_to_fit_if_possible(request, job, None)
        memory_model = fit_memory_formula(one if 2 * model_bytes > gpu.usable.high else job, model)
        memory_model = replace(memory_model, state=memory_model.state - saved)

    def trace_step(job: MicroBatchWorkload, model: Any) -> StepTrace:
        trace = extrapolate_step_trace(job, model)
        return apply_sharding_savings(trace, saved, job.device) if request.fsdp else trace

    whole_batch, job = job, split_batch_to_fit_if_possible(request, job, memory_model)
    trace = trace_step(job, model)
    while memory_model is not None:
        memory_model = memory_model.correct(job.lengths, trace)
        split_again = split_batch_to_fit_if_possible(request, whole_batch, memory_model)
        if len(split_again.lengths) >= len(job.lengths):
            break
        job, trace = split_again, trace_step(split_again, split_again.build_model())  # it took more than was computed

    peak, reserved, need = _estimate_need(request, job, trace, spread)
    runtime, usable = RUNTIME[job.device], gpu.usable
    verdict = judge_memory_fit(need, usable)
    parts = {part: trace.parts.get(part, 0) for part in PARTS} | {"runtime": int(runtime.high)}

    def fits(lengths: Sequence[ExampleLength]) -> bool:
        if memory_model is None:
            return False
        now = memory_model.peak(lengths) + LIBRARY_BYTES.get(job.device, 0) + request.teacher_bytes
        high = now + (reserved.high - peak) + FRAGMENTATION[job.device] * max(0, now - peak)
        return judge_memory_fit(Interval(now, high) + runtime, usable) == "fits"

    adapters, optimizer_bytes = (
        trace.state_bytes_by_part.get("adapters", 0),
        trace.state_bytes_by_part.get("optimizer", 0),
    )
    peaks = {"start": trace.state_bytes_by_part["weights"] + adapters, **trace.peaks}
    if (merge := extrapolate_merge_cpu_peak(job, total_params)) is not None:
        peaks["merge"] = merge
    if request.sampling_bytes:
        peaks["sampling"] = trace.state_bytes + request.sampling_bytes
    # A checkpoint holds the adapter, the optimizer's state and the method's own state. The best one and those that the
    # recipe keeps are on disk when the next is written.
    checkpoint_bytes = adapter_bytes + optimizer_bytes + extra_bytes + SMALL_FILES
    vocab_size = request.model.config.get_text_config().vocab_size
    disk_bytes = (request.save_total_limit + 2) * checkpoint_bytes + adapter_bytes + vocab_size * TOKENIZER_ENTRY
    # The base is read into CPU memory and moved to the GPU; on a Mac both are the same memory. To write a checkpoint
    # file its values are copied from the device, and safetensors builds the file in memory twice.
    loading = trace.state_bytes_by_part["weights"] if job.device == "cuda" else 0
    host_moments = [(trace.host_bytes, "in a step"), (loading, "as the base is read"),
                    (3 * max(adapter_bytes, optimizer_bytes, extra_bytes), "as a checkpoint is written")]  # fmt: skip
    host_bytes, host_peak_moment = max(host_moments) if job.device != "cpu" else (reserved.high, "in a step")
    # Memory is for the longest rows, speed for rows as the data has them.
    usual = put_typical_micro_batches_in_job(request, job) if gpu.rates else job
    usual_trace = trace if usual is job else extrapolate_step_trace(usual)
    longest_row, rows = max(job.row_tokens), len(count_tokens_per_row(job.lengths[0]))
    whole = resize_example_rows(job.lengths[0], lambda _: longest_row)
    # An optimizer step reads parameter, gradient and states, and writes all but the gradient.
    work = TrainingWorkload(
        usual_trace.counts_by_operator_cost,
        usual_trace.attention_flops_by_dtype,
        tokens_per_micro_batch=sum(usual.row_tokens),
        optimizer_step_bytes=2 * optimizer_bytes + 3 * adapters,
        micro_batches_per_step=usual.micro_batches_per_step,
    )
    estimate = ResourceEstimate(
        model=request.model.name,
        method=request.method.name,
        gpu=gpu.name,
        dtype=request.quantization or dtype_name(job.dtype),
        batch=len(job.row_tokens),
        seq_len=longest_row,
        max_tokens_per_micro_batch=job.micro_batch_tokens,
        micro_batches=job.micro_batches_per_step,
        trainable_params=trainable_params,
        total_params=total_params,
        adapter_bytes=adapter_bytes,
        adapter_bytes_at_most=at_most,
        parts=parts,
        allocated_bytes=peak,
        reserved_bytes=reserved,
        runtime_bytes=runtime,
        usable_bytes=usable,
        peaks=peaks,
        host_bytes=int(host_bytes + RUNTIME["cpu"].high),
        disk_bytes=disk_bytes + SMALL_FILES,
        verdict=verdict,
        reason=_explain_verdict(request, verdict, parts, need, usable),
        max_seq_len=find_largest_fitting(
            lambda n: fits([resize_example_rows(length, lambda _: n) for length in job.lengths]),
            positions or MAX_SEQ_LEN,
        ),
        max_batch_size=rows * find_largest_fitting(lambda n: fits([whole] * n), MAX_BATCH_SIZE // rows),
        tokens_per_second=estimate_training_speed(work, gpu),
        work=work,
        evidence=_list_estimate_provenance(request, host_peak_moment),
        notes=[
            *describe_gpu_dtype_and_software_limits(request, job),
            *describe_how_experts_are_held(model, request),
            *packing_notes,
        ],
    )
    if verdict == "fits" or advise == "none" or request.fsdp:
        return estimate
    return replace(estimate, advice=_suggest_memory_savings(job, estimate, gpu, first=advise == "first"))


# --- memory -----------------------------------------------------------------------------------------------------------


def split_batch_to_fit_if_possible(
    request: PlanRequest, job: MicroBatchWorkload, memory_model: MemoryFormula | None
) -> MicroBatchWorkload:
    """Return the job with as many examples in a micro-batch as fit, as training splits a batch; None: none fits."""
    if len(job.lengths) == 1 or not (request.split_batch or request.max_tokens):
        return job

    def fits(examples: int) -> bool:
        some = job.lengths[:examples]
        tokens = count_packed_tokens(some, job.shared_prefix_tokens)
        if request.max_tokens is not None and tokens > request.max_tokens:
            return False
        if memory_model is None:
            return not request.split_batch
        peak = round(SPLIT_MARGIN * (memory_model.peak(some) + LIBRARY_BYTES.get(job.device, 0)))
        peak += request.teacher_bytes
        need = estimate_total_reserved_memory(job.device, peak, memory_model.state) + RUNTIME[job.device]
        return not request.split_batch or judge_memory_fit(need, request.gpu.usable) == "fits"

    count = max(1, find_largest_fitting(fits, len(job.lengths)))
    micro_batches = -(-len(job.lengths) // count) * request.gradient_accumulation_steps
    return replace(job, lengths=job.lengths[:count], micro_batches_per_step=micro_batches)


def put_typical_micro_batches_in_job(request: PlanRequest, job: MicroBatchWorkload) -> MicroBatchWorkload:
    """Return the job with examples in a micro-batch that stand for all of the data, if their lengths are known."""
    if not request.quantiles:
        return job
    prefix, supervised = request.content[:2]
    if request.teacher is not None:  # the lengths say which tokens are prompts
        supervised = 1.0
    mean = sum(map(count_tokens_with_shared_prompt, request.quantiles)) / len(request.quantiles)
    tokens = min(job.micro_batch_tokens, request.max_tokens or MAX_SEQ_LEN)
    count = max(1, min(len(request.lengths), int((tokens - prefix) / max(1, mean - prefix))))
    micro_batches = -(-len(request.lengths) // count) * request.gradient_accumulation_steps
    lengths = pick_length_quantiles(request.quantiles[::-1], count)
    if prefix and count > 1:  # what all rows begin with is not learned
        supervised = min(1.0, request.content.supervised_share * mean / max(1, mean - prefix))
    return replace(job, lengths=lengths, supervised=supervised, micro_batches_per_step=micro_batches)


def estimate_peak_allocated_and_reserved(job: MicroBatchWorkload, trace: StepTrace) -> tuple[int, Interval]:
    """Return the peak of allocated bytes, and what the allocator reserves for them."""
    peak = trace.peak + LIBRARY_BYTES.get(job.device, 0)
    return peak, estimate_total_reserved_memory(job.device, peak, trace.state_bytes)


def estimate_total_reserved_memory(device: str, peak_bytes: int, state_bytes: int) -> Interval:
    """Return what an allocator may reserve for a peak of which `state_bytes` bytes are always allocated."""
    # The state is allocated once and leaves no gaps; tensors that come and go do.
    return Interval(peak_bytes, peak_bytes + FRAGMENTATION[device] * (peak_bytes - state_bytes) + LIBRARY_WORKSPACES)


def judge_memory_fit(need: Interval, usable: Interval) -> MemoryVerdict:
    """Return whether a device with `usable` bytes, (surely, at most), has the bytes that a run needs."""
    if need.high <= usable.low:
        return "fits"
    return "tight" if need.low <= usable.high else "does not fit"


def find_largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, 0 if 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimate_adapter_file_and_method_state_sizes(model: Any) -> tuple[int, int, bool]:
    """Return the bytes of the adapter file and of the method's own state, and whether training may leave fewer.

    Training may leave a smaller file if it chooses ranks (AdaLoRA, EVA); then the size is an upper bound.
    """

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(t.nbytes + TENSOR_HEADER for t in {id(t): t for t in tensors}.values())

    adapters = model.adapter_modules("default")
    growth = model.peft_config["default"].max_added_bytes(adapters)
    tensors, _ = get_adapter_tensors_and_metadata(model, "default")
    extra = [t for adapter in adapters.values() for t in adapter.extra_state().values()]
    return size(tensors.values()) + (growth or 0) + FINGERPRINT_BYTES, size(extra), growth is not None


# --- advice -----------------------------------------------------------------------------------------------------------

NOT_PROVEN = "if bitsandbytes quantizes there, which is not known"
JobChange = Callable[[MicroBatchWorkload], MicroBatchWorkload]
NEEDS_CUDA_12_6 = ("pascal", "volta")
"""Architectures that torch's builds for CUDA 12.8 and newer have no kernels for (github.com/pytorch/pytorch 190385)."""


def _suggest_memory_savings(
    job: MicroBatchWorkload, estimate: ResourceEstimate, gpu: GpuSpec, first: bool
) -> list[MemorySaving]:
    """Return changes that save memory, best first, or up to the `first` that is enough.

    Each change is planned alone. If none is enough, the first entry combines as many as are needed.
    """

    def judge(changed: MicroBatchWorkload) -> tuple[int, MemoryVerdict]:
        if too_large:  # then only the weights change, and no step needs to be traced if they are still more than it has
            kept = count_model_bytes(changed)
            if kept + RUNTIME[changed.device].low > gpu.usable.high:
                return estimate.parts["weights"] + estimate.parts["adapters"] - kept, "does not fit"
        # The fused AdamW allocates nothing, so the highest point is not later than the backward pass.
        step_allocates = changed.optimizer != "adamw" or not changed.method.copies_in_fp32
        trace = extrapolate_step_trace(changed, stop_after_backward=not step_allocates)
        peak, reserved = estimate_peak_allocated_and_reserved(changed, trace)
        return estimate.allocated_bytes - peak, judge_memory_fit(reserved + RUNTIME[changed.device], gpu.usable)

    def count_model_bytes(job: MicroBatchWorkload) -> int:
        if layers_add_up:
            return extrapolate_allocated_model_bytes(job)
        return count_allocated_model_bytes(job.build_model(), job.device)

    useful, advice = [], []
    # What a step holds beside the weights is no help where the weights alone are more than the card has.
    too_large = estimate.parts["weights"] + RUNTIME[job.device].low > gpu.usable.high
    whole = estimate.parts["weights"] + estimate.parts["adapters"]
    layers_add_up = too_large and extrapolate_allocated_model_bytes(job) == whole
    for text, change in list_memory_saving_changes(job, gpu):
        changed = change(job)
        if too_large and (changed.dtype, changed.quantization) == (job.dtype, job.quantization):
            continue
        try:
            saves, verdict = judge(changed)
        except Exception as error:  # of the base's code: Gemma 3n clamps weights in place, which fails on those in NF4
            if is_out_of_memory(error):
                raise
            continue
        if saves > 0:
            useful.append((text, change))
            advice.append(MemorySaving(text, saves, verdict))
            if first and verdict == "fits":
                break
    # Of the changes that are enough the cheapest first, which is the order they were tried in.
    advice.sort(key=lambda a: (a.verdict != "fits", -a.saves if a.verdict != "fits" else 0))
    if any(a.verdict == "fits" for a in advice):
        return advice
    combined = job
    for count, (_, change) in enumerate(useful, 1):
        combined = change(combined)
        if count > 1:
            saves, verdict = judge(combined)
            if verdict == "fits":
                return [MemorySaving(" and ".join(text for text, _ in useful[:count]), saves, verdict), *advice]
    return advice


def list_memory_saving_changes(job: MicroBatchWorkload, gpu: GpuSpec) -> list[tuple[str, JobChange]]:
    """Return changes to a job, those that cost least first."""
    changes: list[tuple[str, JobChange]] = []
    longest = max(job.row_tokens)
    if not job.gradient_checkpointing:
        changes.append(("--gradient-checkpointing (a third slower)", partial(replace, gradient_checkpointing=True)))
    elif job.device == "cuda" and not job.offload_activations:
        changes.append(("--offload-activations", partial(replace, offload_activations=True)))
    if job.mlp_tile_size is None and job.micro_batch_tokens >= 2 * ADVISED_TILE_SIZE:
        changes.append((f"--mlp-tile-size {ADVISED_TILE_SIZE}", partial(replace, mlp_tile_size=ADVISED_TILE_SIZE)))
    if len(job.lengths) > 1:
        one_example = partial(replace, lengths=job.lengths[:1], micro_batches_per_step=2)
        changes.append(("--batch-size 1, and --gradient-accumulation-steps as many", one_example))
    if job.method.trains_every_weight:  # which leaves nothing to quantize
        return [*_list_changes_of_full_fine_tuning(job), *changes]
    if job.dtype == torch.float32 and job.device == "cuda" and not gpu.bf16 and _computes_float16_faster(gpu):
        changes.append(("--dtype float16", partial(replace, dtype=torch.float16)))
    elif job.dtype == torch.float32:
        emulated = "" if gpu.bf16 and job.device != "cpu" else " (slower where the device emulates it)"
        changes.append((f"--dtype bfloat16{emulated}", partial(replace, dtype=torch.bfloat16)))
    quantizations = [
        (f"--quantization {kind}", partial(replace, quantization=kind))
        for kind in ("nf4", "int8")
        if job.quantization != "nf4" and get_stored_quantization(job.base_config) is None
    ]
    if gpu.quantization_is_proven:
        changes += quantizations
    if longest > 256:

        def shorten(j: MicroBatchWorkload) -> MicroBatchWorkload:  # as it is by then: it may have fewer examples
            return replace(
                j, lengths=tuple(resize_example_rows(n, lambda tokens: min(tokens, longest // 2)) for n in j.lengths)
            )

        changes.append((f"--max-seq-len {longest // 2}", shorten))
    if not gpu.quantization_is_proven:
        changes += [(f"{text} ({NOT_PROVEN})", change) for text, change in quantizations]
    return changes


def _list_changes_of_full_fine_tuning(job: MicroBatchWorkload) -> list[tuple[str, JobChange]]:
    changes: list[tuple[str, JobChange]] = []
    method: Any = job.method
    if job.optimizer == "adamw":
        changes.append(("--optimizer adamw-8bit", partial(replace, optimizer="adamw-8bit")))
    if job.dtype == torch.bfloat16 and method.copies_in_fp32:
        rounded = replace(method, bf16_stochastic_round=True)
        changes.append(("--set method.bf16_stochastic_round=true", partial(replace, method=rounded)))
    return changes


# --- text -------------------------------------------------------------------------------------------------------------


def _explain_verdict(
    request: PlanRequest, verdict: MemoryVerdict, parts: dict[str, int], need: Interval, usable: Interval
) -> str:
    """Return the reason of a verdict in one sentence."""
    reason = f"it needs {format_bytes(need.low)} to {format_bytes(need.high)} of {format_bytes(usable.low)}"
    if verdict == "fits":
        reason += f", which leaves {format_bytes(usable.low - need.high)} free"
    elif parts["weights"] + RUNTIME[request.gpu.device].low > usable.high:
        reason += f": the weights alone ({format_bytes(parts['weights'])}) are more than the card has"
    else:
        largest = sorted(parts, key=lambda part: (parts[part], part), reverse=True)[:2]
        reason += "; the largest parts are " + " and ".join(f"{p} ({format_bytes(parts[p])})" for p in largest)
        reason += ": try it, with nothing else on the card" if verdict == "tight" else ""
    if request.fsdp:
        reason += f"; the base is sharded over {request.processes} processes, and this is what one of them takes"
    elif request.processes > 1:
        reason += (f"; each of {request.processes} processes holds the whole base, and this is what one of them takes "
                   "(train.fsdp shards it)")  # fmt: skip
    return reason


def _computes_float16_faster(gpu: GpuSpec) -> bool:
    rates = gpu.rates or {}
    return rates.get("float16", 0) > rates.get("float32", 0)


def describe_gpu_dtype_and_software_limits(request: PlanRequest, job: MicroBatchWorkload) -> list[str]:
    """Return what the GPU's dtypes and its software cost this run, in whole sentences."""
    gpu, notes = request.gpu, list(request.notes)
    rates = gpu.rates or {}
    if job.device == "cuda" and request.dtype == "auto" and job.dtype == torch.float32:
        note = f"{gpu.name} has no bfloat16 units, so it trains in float32, which takes twice the memory. "
        if _computes_float16_faster(gpu):
            fast, slow = rates["float16"], rates["float32"]
            note += (f"--dtype float16 halves the memory and computes {fast / slow:.1f} times faster "
                     f"({fast / 1e12:.4g} against {slow / 1e12:.4g} TFLOPS); a few bases overflow in it.")  # fmt: skip
        else:
            note += f"--dtype bfloat16 halves the memory; {gpu.name} emulates it, at a speed that is not known."
        notes.append(note)
    if job.dtype == torch.bfloat16 and rates and "bfloat16" not in rates:
        notes.append(f"{gpu.name} emulates bfloat16: the speed is that of float32, and may be lower.")
    if request.quantization in KINDS and not gpu.quantization_is_proven:
        notes.append(f"Whether bitsandbytes quantizes on {gpu.name} is not known to a plan.")
    if job.device == "mps" and request.dtype == "auto" and gpu.auto_bf16 is None:
        notes.append("Before macOS 14 a Mac trains in float32, which takes twice the memory.")
    if gpu.architecture in NEEDS_CUDA_12_6:
        notes.append(
            f"{gpu.name} needs a build of torch for CUDA 12.6: newer ones have no kernels for {gpu.architecture}."
        )
    return notes


def describe_how_experts_are_held(model: Any, request: PlanRequest) -> list[str]:
    """Return in how many bits a quantized mixture's experts are, in whole sentences; nothing for another base."""
    experts = [p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3 and not p.requires_grad]
    notes = []
    if experts and request.quantization:
        size, held_in = format_bytes(sum(p.nbytes for p in experts)), dtype_name(experts[0].dtype)
        if isinstance(experts[0], QuantizedWeight):
            bits = "few" if request.quantization in METHODS else "4"
            notes.append(f"The experts ({size}) are held in {bits} bits; each product dequantizes some at a time.")
        else:
            notes.append(f"The experts ({size}) stay in {held_in}: --quantization nf4 of a base in 16 or 32 bits "
                         "holds them in 4 bits.")  # fmt: skip
    if experts and request.model.config.model_type == "gpt_oss" and request.quantization != "mxfp4":
        notes.append(
            "The published checkpoint is in MXFP4, and trains as it is; this is the plan of a copy in 16 bits."
        )
    return notes


def _list_estimate_provenance(request: PlanRequest, host_peak_moment: str) -> dict[str, str]:
    """Return the kind of evidence of each figure; `host_peak_moment` is when CPU memory is highest."""
    gpu = request.gpu
    sharded = "; the sharded base: computed, what is gathered beside a layer is guessed" if request.fsdp else ""
    traced = f"traced{sharded}"
    return {
        **dict.fromkeys(("trainable_params", "total_params", "adapter_bytes"), "computed"),
        **dict.fromkeys(("reserved_bytes", "runtime_bytes"), "guessed"),
        **dict.fromkeys(("allocated_bytes", "peaks"), traced),
        **dict.fromkeys(("max_seq_len", "max_batch_size"), "computed by a formula fitted to traces"),
        "parts": f"{traced}; runtime: guessed",
        "usable_bytes": "measured on this machine" if gpu.kind == "cpu" else f"published ({gpu.source})",
        "host_bytes": f"computed, {host_peak_moment}; guessed runtime",
        "disk_bytes": "computed, an upper bound",
        "tokens_per_second": f"computed from traced work and published rates ({gpu.source}); the range is "
        + ("that of published runs" if gpu.vendor in UTILIZATION else "guessed")
        if gpu.measured is None
        else gpu.measured.evidence,
        "model": request.model.source,
    }
