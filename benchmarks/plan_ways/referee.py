"""What a job's real step takes on this machine's CPU: sums of the events of torch's own allocator."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from slimtune import get_peft_model
from slimtune.build import optimizer_of
from slimtune.contract.layout import laid_out
from slimtune.plan.job import Job
from slimtune.step import accumulated, collator_for

STEP = "the step that is looked at"


def measured(job: Job) -> tuple[int, int]:
    """Build, adapt and train for two optimizer steps; return the bytes held after the first, and the second's most.

    Weights and rows are random. Everything that the allocator gives and takes from the model's first weight on counts,
    as the profiler's `[memory]` events tell it.
    """
    gc.collect()  # what is left from before must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        _train(job)
    found = done.profiler.kineto_results.events()
    begin, end = next((e.start_ns(), e.end_ns()) for e in found if e.name() == STEP)
    events = sorted(((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"), key=lambda e: e[0])
    state = sum(size for at, size in events if at < begin)
    during = itertools.accumulate((size for at, size in events if begin <= at <= end), initial=state)
    return state, max(during)


def _train(job: Job) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(job.base, dtype=job.dtype)
    if job.method is not None:
        model = get_peft_model(model, job.method)
        job.method.begins(100)
    if job.checkpointing:
        # transformers 5.2x renamed it.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model.train()
    optimizer = optimizer_of(model, job.optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    collator = collator_for(model, 0, packing=job.packing, share=False)
    vocabulary = model.config.get_text_config().vocab_size

    def step(number: int) -> None:
        rows = [[torch.randint(vocabulary, (n,)).tolist() for n in job.lengths] for _ in range(job.passes)]
        packs = [collator([{"input_ids": row, "labels": row} for row in some]) for some in rows]
        accumulated(model, packs, lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if job.method is not None:
            model.update_and_allocate(number)
        optimizer.zero_grad()

    with laid_out(model):
        step(1)
        gc.collect()
        with record_function(STEP):
            step(2)
