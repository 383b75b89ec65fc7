"""The real step on fake tensors: what it takes, by part and by phase, without a weight.

The model is built on `meta` by the code that trains (`build.outline`), its tensors are made fake, and one optimizer
step runs as training runs it: the rows of each pass forwards and backwards, clipping, AdamW, gradients dropped. The
optimizer's state is there from the start, as in every step but the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ..build import optimizer_of
from ..contract.layout import laid_out
from ..ops.device import acting_as
from ..step import accumulated, collator_for, supervised_nats
from .fake import make_fake
from .job import Job
from .storage import PARTS, Storages

BLOCK = {"cuda": 512}
"""What an allocation is rounded up to (PyTorch's CUDA caching allocator)."""


@dataclass(frozen=True)
class Trace:
    """What one optimizer step takes.

    Args:
        state: bytes that are always there, by part: weights, adapters, optimizer.
        parts: bytes at the step's highest point, by part; their sum is the peak.
        peaks: most bytes live in each phase: forward and backward ("passes"), "optimizer", "evaluation".
        work: how often an operator of (floating point operations, bytes moved, dtype) ran in one pass.
        events: allocations and releases of the step in order, `(storage, ± bytes)`, the state's first.
    """

    state: dict[str, int]
    parts: dict[str, int]
    peaks: dict[str, int]
    work: Counter[tuple[int, int, torch.dtype]]
    events: list[tuple[int, int]]

    @property
    def peak(self) -> int:
        """Most bytes live at once in training and evaluating."""
        return max(self.peaks.values())


def trace(job: Job, model: Any = None) -> Trace:
    """Run a job's step on fake tensors.

    Args:
        job: what is to run.
        model: the job's model on meta, if it was built already; it is used up.

    Raises:
        UsageError: as `build.outline`.
        ModelError: the step does something that hangs on values, and cannot be traced.
    """
    model = job.outline() if model is None else model
    vocabulary = model.config.get_text_config().vocab_size
    storages = Storages(BLOCK.get(job.device, 1), vocabulary, events=True)
    with FakeTensorMode(), acting_as(job.device), _no_masks_for_fakes():
        make_fake(model)
        model.train()
        collator = collator_for(model, 0, packing=job.packing, share=False)
        batch = collator([{"input_ids": [1] * n, "labels": [1] * n} for n in job.lengths])
        optimizer = optimizer_of(model, job.optimizer)
        _let_states_be(model, optimizer)
        with storages, laid_out(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            storages.hold((*model.parameters(), *model.buffers(), *_kept_beside(model)), "weights")
            if job.method is not None:
                storages.hold(trained, "adapters")
            storages.hold(_tensors_in(optimizer.state), "optimizer")
            state = dict(storages.now)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: storages.hold([p.grad], "gradients"))
            if job.passes > 1:  # beside every pass but the first lie the gradients of those before
                _fill_gradients(trained)
                storages.hold((p.grad for p in trained), "gradients")
            storages.phase("passes")
            storages.work.clear()
            accumulated(model, [batch], lambda loss: loss.backward())
            work = storages.work.copy()
            storages.phase("optimizer")
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            _stepped(model)
            optimizer.zero_grad()
            step_parts, events = dict(storages.at_peak), list(storages.events or ())
            storages.phase("evaluation")
            model.eval()
            with torch.no_grad():
                supervised_nats(model, batch)
    peaks = {k: v for k, v in storages.peaks.items() if k != "start"}
    return Trace(state, {k: step_parts.get(k, 0) for k in PARTS}, peaks, work, events)


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
    if hasattr(model, "update_and_allocate"):
        try:
            model.update_and_allocate(1)
        except DataDependentOutputException:
            pass  # AdaLoRA chooses ranks by their scores; what it keeps for that was made before


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    for held in value.values():
        if isinstance(held, dict):
            yield from _tensors_in(held)
        elif isinstance(held, torch.Tensor):
            yield held


def _kept_beside(model: Any) -> Iterator[torch.Tensor]:
    """Yield tensors that modules keep as plain attributes (the frequencies of rotary embeddings)."""
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, torch.Tensor))


@contextmanager
def _no_masks_for_fakes() -> Iterator[None]:
    """Let transformers make a mask only where it would for real tensors: of fakes it thinks that a compiler traces."""
    from transformers import masking_utils

    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before
