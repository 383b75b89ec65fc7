"""Peak memory of one optimizer step, by part and by phase, from the real training code on fake tensors.

The model is built on `meta` by the code that trains and its tensors are made fake. Then one optimizer step runs as in
training: forward and backward of the packed rows, gradient clipping, AdamW, zeroing gradients, and one evaluation. The
optimizer's state exists from the start, as in every step but the first.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.adapters.adapter_module import MergeUnsupported
from ..core.attention.attention_functions import using_packed_attention
from ..core.data.collator import IGNORE_INDEX, Example
from ..core.data.example_lengths import ExampleLength
from ..core.foundation.device import collect_simulated_attention_flops, simulating_device_for_kernel_choice
from ..core.models.lm_head import get_classifier_head, get_lm_head_with_scale_and_cap
from ..core.training.loss import compute_token_nll_or_row_logits, forward_backward, make_collator
from ..core.training.optimizer import build_optimizer
from ..errors import ModelError, UsageError
from .fake_tensors import fake_tensor_mode, list_module_tensors, replace_meta_with_fake_cpu_tensors
from .memory_tracker import MemoryTracker, iterate_nested_tensors
from .meta_model import build_adapted_meta_model
from .packed_lengths import limit_shared_prefix
from .plan_request import MicroBatchWorkload
from .plan_result import PARTS
from .teacher_examples import add_dummy_teacher_rows, make_teacher_objective_and_collator
from .traced_scans import tracing_scans_as_one_operator

GATHERED_LAYERS = (1, 3)
"""Fewest and most layers that are whole at a time if the base is sharded."""
ALLOCATION_BLOCK = {"cuda": 512}
"""PyTorch's CUDA allocator rounds each allocation up to this many bytes."""
FLOAT32_MERGE_PARAMS = 1_000_000_000
"""Models with fewer parameters are merged in float32."""
MAX_OPERATORS, MAX_OPERATORS_PER_LAYER = 150_000, 2_000
"""A layer runs 1,600 operators in a step; one of Mamba without its kernels runs 100,000 for 1024 tokens."""
_LOOPS_OVER_TOKENS = {"Qwen4ExpTextQSAIndexer"}
"""Modules of transformers that run some thirty operators for each token of a row."""
TOTAL_STEPS = 1 << 20
"""Length of the run whose first step is traced; a method whose rank shrinks during training is at its largest."""
BACKWARD = ("backward, last layer", "backward, between", "backward, first layer")
"""Phases of the backward pass: activations are largest in the first, gradients in the last."""


@dataclass(frozen=True)
class StepTrace:
    """Memory and operators of one optimizer step.

    Args:
        state: bytes that are always allocated, by part: weights, adapters, optimizer.
        phases: bytes by part at the highest point of each phase: "forward", "loss" (logits and their gradient), those
            of `BACKWARD`, "optimizer", "evaluation".
        counts_by_operator_cost: how often an operator of (FLOPs, bytes moved, dtype) runs in one micro-batch.
        attention_flops_by_dtype: FLOPs of fused attention in one micro-batch, by dtype; no operator's cost has them.
        host_bytes: highest number of bytes in CPU memory instead of the device's (offloaded activations).
    """

    state_bytes_by_part: dict[str, int]
    bytes_by_phase_and_part: dict[str, dict[str, int]]
    counts_by_operator_cost: Counter[tuple[int, int, torch.dtype]]
    attention_flops_by_dtype: Counter[torch.dtype]
    host_bytes: int = 0

    @property
    def peaks(self) -> dict[str, int]:
        """Highest number of bytes in each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.bytes_by_phase_and_part.items()}

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the highest point of the optimizer step, without the evaluation."""
        return max(
            (v for k, v in self.bytes_by_phase_and_part.items() if k != "evaluation"),
            key=lambda parts: sum(parts.values()),
        )

    @property
    def step(self) -> int:
        """Highest number of bytes in the optimizer step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Highest number of bytes in training and evaluation."""
        return max(self.peaks.values())

    @property
    def state_bytes(self) -> int:
        return sum(self.state_bytes_by_part.values())


def trace_training_step(job: MicroBatchWorkload, model: Any = None, *, stop_after_backward: bool = False) -> StepTrace:
    """Run one optimizer step of a job on fake tensors.

    Args:
        job: what to train.
        model: the job's model on meta, if it exists already; it is used up.
        stop_after_backward: stop after the backward pass, and do not count work.

    Raises:
        UsageError: the targets match nothing.
        ModelError: the step depends on tensor values.
    """
    model = job.build_model() if model is None else model
    if looping := next((name for m in model.modules() if (name := type(m).__name__) in _LOOPS_OVER_TOKENS), None):
        raise ModelError(
            f"transformers' {looping} goes through a row token by token: a plan would take minutes, and a step hours",
            "a step that processes all tokens of a row at once",
        )
    vocab_size = model.config.get_text_config().vocab_size
    with fake_tensor_mode() as operators, simulating_device_for_kernel_choice(job.device):
        replace_meta_with_fake_cpu_tensors(model)
        model.train()
        collator, objective = make_collator(model, 0, packing=job.packing), None
        examples = make_dummy_examples(job.lengths, job.supervised, job.shared_prefix_tokens)
        if job.teacher is not None:
            objective, collator = make_teacher_objective_and_collator(job.teacher, collator)
            examples = add_dummy_teacher_rows(examples, job.teacher)
        pack = collator(examples)
        tensors = list(iterate_nested_tensors(pack))
        # Without values, which `empty_like` would give them: those of the pack are known.
        other_packs = [
            torch.empty(t.shape, dtype=t.dtype) for _ in range(job.micro_batches_per_step - 1) for t in tensors
        ]
        optimizer = build_optimizer(model, job.optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        for config in getattr(model, "peft_config", {}).values():
            config.on_train_begin(TOTAL_STEPS)
        _fill_gradients(trained)
        _optimizer_step(model, optimizer)

        tracker = MemoryTracker(
            ALLOCATION_BLOCK.get(job.device, 1),
            vocab_size,
            not stop_after_backward,
            separate_host=job.device == "cuda",
            max_operators=MAX_OPERATORS + MAX_OPERATORS_PER_LAYER * job.num_layers,
            find_result=operators.find_result,
        )
        with (
            tracker,
            tracing_scans_as_one_operator(tracker),
            collect_simulated_attention_flops(tracker.attention_flops_by_dtype),
            using_packed_attention(model),
        ):
            _assign_state(tracker, model, optimizer)
            tracker.assign((*tensors, *other_packs), "activations")
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], "gradients"))
            if job.micro_batches_per_step > 1:  # every micro-batch but the first adds to the gradients of those before
                _fill_gradients(trained)
                tracker.assign((p.grad for p in trained), "gradients")
            tracker.start_phase("forward")
            tracker.counts_by_operator_cost.clear()
            tracker.attention_flops_by_dtype.clear()
            with _mark_phases(model, tracker):
                forward_backward(model, [pack], objective=objective)
            work, attention = tracker.counts_by_operator_cost.copy(), tracker.attention_flops_by_dtype.copy()
            state = _assign_state(tracker, model, optimizer)  # again: DoRA keeps norms that its first forward computes
            if not stop_after_backward:
                tracker.start_phase("optimizer")
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                _optimizer_step(model, optimizer)
                tracker.start_phase("evaluation")
                model.eval()
                with torch.no_grad():
                    compute_token_nll_or_row_logits(model, pack)
    parts = PARTS[:-1]  # the runtime is no tensor
    phases = {p: {k: live.get(k, 0) for k in parts} for p, live in tracker.phases.items() if p != "start"}
    return StepTrace(state, phases, work, attention, tracker.host_peak)


def make_dummy_examples(
    example_lengths: Sequence[ExampleLength], supervised_fraction: float = 1.0, shared_prefix_tokens: int = 0
) -> list[Example]:
    """Return examples of these lengths; rows of one share a prompt, all share so many first tokens, and nothing else.

    What is shared is not learned. Of the other tokens of a row, the last ones are learned, a share of
    `supervised_fraction`.
    """
    examples, tokens = [], itertools.count(1)
    shared = limit_shared_prefix(example_lengths, shared_prefix_tokens)
    for length in example_lengths:
        prefix, *answers = (shared, length - shared) if isinstance(length, int) else length
        prompt, rows = [0] * shared + [next(tokens)] * (prefix - shared), [[next(tokens)] * n for n in answers]
        ids = [t for row in rows for t in prompt + row]
        learned = [max(1, round(supervised_fraction * len(row))) for row in rows]
        labels = [t for row, n in zip(rows, learned, strict=True)
                  for t in [IGNORE_INDEX] * (prefix + len(row) - n) + row[-n:]]  # fmt: skip
        examples.append({"input_ids": ids, "labels": labels, "row_lengths": [prefix + n for n in answers]})
    return examples


def trace_merge_peak(job: MicroBatchWorkload, dtype: torch.dtype) -> int | None:
    """Return the peak bytes while the adapter is merged into weights of `dtype`; None if it cannot be merged."""
    model = build_adapted_meta_model(job.base_config, job.method, dtype)
    tracker = MemoryTracker()
    with fake_tensor_mode(), simulating_device_for_kernel_choice("cpu"):
        replace_meta_with_fake_cpu_tensors(model)
        with tracker, torch.no_grad():
            tracker.assign(list_module_tensors(model), "weights")
            try:
                with suppress(DataDependentOutputException):  # all is merged when tied weights are compared
                    model.merge_adapter()
            except (MergeUnsupported, UsageError):
                return None
    return tracker.peak


@contextmanager
def _mark_phases(model: Any, tracker: MemoryTracker) -> Iterator[None]:
    """Start phase "loss" when hidden states reach the head, and the backward phases when gradients reach a layer."""
    head = get_lm_head_with_scale_and_cap(model)
    module = get_classifier_head(model) if head is None else head.module
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def start_on_gradient(states: Any, phase: str) -> None:
        states = states[0] if isinstance(states, tuple) else states
        if states.requires_grad:
            states.register_hook(lambda _: tracker.start_phase(phase))

    def on_head(_: Any, args: tuple) -> None:
        if not torch.is_grad_enabled():  # a teacher's pass
            return
        tracker.start_phase("loss")
        start_on_gradient(args, BACKWARD[0])

    hooks = [module.register_forward_pre_hook(on_head)] if module is not None else []
    for i, layer in enumerate(layers):
        phase = BACKWARD[0] if i == len(layers) - 1 else BACKWARD[2] if i == 0 else BACKWARD[1]
        hooks.append(layer.register_forward_hook(lambda _, args, out, phase=phase: start_on_gradient(out, phase)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _assign_state(tracker: MemoryTracker, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Assign the model and the optimizer to their parts; return the bytes of each part."""
    tracker.assign(list_module_tensors(model), "weights")
    if hasattr(model, "peft_config"):
        tracker.assign((p for p in model.parameters() if p.requires_grad), "adapters")
    tracker.assign(iterate_nested_tensors(optimizer.state), "optimizer")
    return {part: tracker.live[part] for part in ("weights", "adapters", "optimizer") if tracker.live[part]}


def _fill_gradients(trained: Iterable[torch.nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)


def _optimizer_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    # AdaLoRA chooses ranks by the values of its scores; the tensors that it needs for that exist by then.
    with suppress(DataDependentOutputException):
        getattr(model, "update_and_allocate", lambda _: None)(1)
    optimizer.zero_grad()


# --- a base that is sharded over N processes (`train.fsdp`) -----------------------------------------------------------
#
#     W / N  always  +  R  while a step runs  +  k · L      W weights, R those outside layers, L of the largest layer
#
# k: a layer is gathered while it runs (1); its neighbour and the buffer that both are gathered into may exist too (3).


def estimate_sharding_savings_and_uncertainty(model: Any, processes: int) -> tuple[int, float]:
    """Return the bytes that sharding the base of a model on meta saves, and how many fewer it may save."""

    def count_bytes(module: Any) -> int:  # of the base itself: adapters are not sharded
        own = {n: p for n, p in module.named_parameters() if ".adapters." not in n and ".modules_to_save." not in n}
        return sum(p.nbytes for p in own.values() if not p.requires_grad)

    layers = [count_bytes(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    total = count_bytes(model)
    largest, rest = max(layers, default=total), total - sum(layers)
    low, high = (total / processes + rest + k * largest for k in GATHERED_LAYERS)
    low, high = min(low, total), min(high, total + 2 * largest)
    return int(total - low), high - low


def apply_sharding_savings(trace: StepTrace, saved_weight_bytes: int, device: str) -> StepTrace:
    """Return what a traced step takes in one of the processes, if sharding saves so many bytes."""

    def shard(parts: dict[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - saved_weight_bytes}

    phases = {name: shard(parts) for name, parts in trace.bytes_by_phase_and_part.items()}
    if device == "cpu":  # each process reads the whole base before it is sharded: at that moment nothing is saved
        phases["loading"] = {**dict.fromkeys(phases["forward"], 0), "weights": trace.state_bytes_by_part["weights"]}
    return replace(trace, state_bytes_by_part=shard(trace.state_bytes_by_part), bytes_by_phase_and_part=phases)
