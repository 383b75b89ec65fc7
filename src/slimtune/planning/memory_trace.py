"""The real step on fake tensors: what it takes, by part and by phase, without a weight.

The model is built on `meta` by the code that trains (`build.outline`), its tensors are made fake, and one optimizer
step runs as training runs it: the rows of each pass forwards and backwards, clipping, AdamW, gradients dropped. The
optimizer's state is there from the start, as in every step but the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.base import MergeUnsupported
from ..attention.register import packed_attention
from ..errors import UsageError
from ..models.lm_head import get_lm_head
from ..setup import build_meta_model as build_outline
from ..train_step.loss import forward_backward, make_collator, token_nll
from ..train_step.optimizer import build_optimizer
from ..utils.simulated_device import simulate_device
from .fake_tensors import all_tensors, fake_mode, make_fake
from .storage import PARTS, Storages
from .training_job import TrainingJob

BLOCK = {"cuda": 512}
"""What an allocation is rounded up to (PyTorch's CUDA caching allocator)."""
SMALL = 1_000_000_000
"""Below so many parameters a merge is done and proven in float32."""
LONG = 1 << 20
"""Steps of the run whose first one is traced: a method that changes with time is at its largest."""


BACKWARD = ("backward, last layer", "backward, between", "backward, first layer")
"""Phases of the way back: activations are the most in the first of them, gradients in the last."""


@dataclass(frozen=True)
class Trace:
    """What one optimizer step takes.

    Args:
        state: bytes that are always there, by part: weights, adapters, optimizer.
        phases: bytes by part at the highest point of each phase: "forward", "loss" (logits and their gradient), those
            of `BACKWARD`, "optimizer", "evaluation".
        work: how often an operator of (floating point operations, bytes moved, dtype) ran in one pass.
        events: allocations and releases of the step in order, `(storage, ± bytes)`, the state's first.
        host: most bytes that lie in the machine's memory instead of the device's at once.
    """

    state: dict[str, int]
    phases: dict[str, dict[str, int]]
    work: Counter[tuple[int, int, torch.dtype]]
    events: list[tuple[int, int]]
    host: int = 0

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes live at once in each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the highest point of the optimizer step; their sum is `step`."""
        return max((v for k, v in self.phases.items() if k != "evaluation"), key=lambda held: sum(held.values()))

    @property
    def step(self) -> int:
        """Most bytes live at once in an optimizer step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Most bytes live at once in training and evaluating."""
        return max(self.peaks.values())


def trace_memory(job: TrainingJob, model: Any = None, *, whole: bool = True, counted: bool = True) -> Trace:
    """Run a job's step on fake tensors.

    Args:
        job: what is to run.
        model: the job's model on meta, if it was built already; it is used up.
        whole: trace the optimizer's part and evaluation, too; without them there is no optimizer's state either.
        counted: count the work and keep the events.

    Raises:
        UsageError: as `build.outline`.
        ModelError: the step does something that hangs on values, and cannot be traced.
    """
    model = job.outline() if model is None else model
    vocabulary = model.config.get_text_config().vocab_size
    with fake_mode() as fakes, simulate_device(job.device):
        make_fake(model)
        model.train()
        collator = make_collator(model, 0, packing=job.packing, share_prefix=False)
        rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in job.lengths]
        pack = collator(rows)
        others = [torch.empty(t.shape, dtype=t.dtype) for _ in range(job.passes - 1) for t in _tensors_in(pack)]
        optimizer = build_optimizer(model, job.optimizer)
        for config in getattr(model, "peft_config", {}).values():
            config.on_train_begin(LONG)
        if whole:
            _let_states_be(model, optimizer)
        storages = Storages(
            BLOCK.get(job.device, 1), vocabulary, counted, counted, fakes.recalled, host_apart=job.device == "cuda"
        )
        with storages, packed_attention(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            _hold_state(storages, model, optimizer)
            storages.hold((*_tensors_in(pack), *others), "activations")
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: storages.hold([p.grad], "gradients"))
            if job.passes > 1:  # beside every pass but the first lie the gradients of those before
                _fill_gradients(trained)
                storages.hold((p.grad for p in trained), "gradients")
            storages.phase("forward")
            storages.work.clear()
            with _phases_of(model, storages):
                forward_backward(model, [pack])
            work = storages.work.copy()
            state = _hold_state(storages, model, optimizer)  # with what is found once and kept (DoRA's lengths)
            if whole:
                storages.phase("optimizer")
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                _stepped(model)
                optimizer.zero_grad()
            events = list(storages.events or ())
            if whole:
                storages.phase("evaluation")
                model.eval()
                with torch.no_grad():
                    token_nll(model, pack)
    parts = {phase: {p: held.get(p, 0) for p in PARTS} for phase, held in storages.at_peaks.items() if phase != "start"}
    return Trace(state, parts, work, events, storages.host_peak)


def trace_merge(job: TrainingJob) -> int | None:
    """Return the most bytes of tensors while an adapter is merged into its base, None where it cannot be.

    It is done on the machine's own memory, in float32 where the model is small (`export.merge`).
    """
    if job.method is None:
        return None
    size = sum(p.numel() for p in build_outline(job.base, None, job.dtype).parameters())
    dtype = torch.float32 if size < SMALL else job.dtype
    model = build_outline(job.base, job.method, dtype)
    storages = Storages()
    with fake_mode(), simulate_device("cpu"):
        make_fake(model)
        with storages, torch.no_grad():
            storages.hold(all_tensors(model), "weights")
            try:
                model.merge_adapter()
            except (MergeUnsupported, UsageError):
                return None
            return max(storages.peaks.values())


@contextmanager
def _phases_of(model: Any, storages: Storages) -> Iterator[None]:
    """Begin "loss" where hidden states reach the head, and a phase of "backward" where a gradient reaches a layer."""
    head = get_lm_head(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def reached(_: Any, args: tuple) -> None:
        storages.phase("loss")
        _when_gradient_comes(args[0], lambda: storages.phase(BACKWARD[0]))

    def begins(phase: str) -> Callable[..., None]:
        return lambda _, args, out: _when_gradient_comes(out, lambda: storages.phase(phase))

    hooks = [head.module.register_forward_pre_hook(reached)] if head is not None else []
    for i, layer in enumerate(layers):
        phase = BACKWARD[0] if i == len(layers) - 1 else BACKWARD[2] if i == 0 else BACKWARD[1]
        hooks.append(layer.register_forward_hook(begins(phase)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _when_gradient_comes(out: Any, then: Callable[[], None]) -> None:
    states = out[0] if isinstance(out, tuple) else out
    if states.requires_grad:
        states.register_hook(lambda _: then())


def _hold_state(storages: Storages, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Count what is always there as parts of the state, and return their bytes."""
    storages.hold(all_tensors(model), "weights")
    if hasattr(model, "peft_config"):
        storages.hold((p for p in model.parameters() if p.requires_grad), "adapters")
    storages.hold(_tensors_in(optimizer.state), "optimizer")
    return {part: storages.now[part] for part in ("weights", "adapters", "optimizer") if storages.now[part]}


def _let_states_be(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state, as the first step does."""
    _fill_gradients(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    _stepped(model)
    optimizer.zero_grad()


def _fill_gradients(trained: Iterable[torch.nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)


def _stepped(model: Any) -> None:
    # AdaLoRA chooses ranks by their scores; what it keeps for that was made before.
    with suppress(DataDependentOutputException):
        getattr(model, "update_and_allocate", lambda _: None)(1)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    for held in value.values():
        if isinstance(held, dict):
            yield from _tensors_in(held)
        elif isinstance(held, torch.Tensor):
            yield held
