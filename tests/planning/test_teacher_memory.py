"""What is planned for runs with a teacher, against real runs, measured by torch's own allocator events."""

import gc
import itertools
import random
import string

import numpy as np
import pytest
from row_files import write_jsonl
from tiny_run import recipe_of
from torch.profiler import ProfilerActivity, profile, record_function

from slimtune.core.training import loss, training_loop
from slimtune.core.training.train import train
from slimtune.objectives.teacher_logps import TopLogps
from slimtune.planning import memory_probe
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

SYSTEM = "You know the shop and all that it sells."
TASKS = {
    "context": {"context": "You are a shop. Answer every customer in capital letters, and thank them. " * 4},
    "sdft": {"lmbda": 0, "seq_kd": False},
    "distill": {"lmbda": 0, "teacher_model_name_or_path": "BASE"},
    "distill from a server": {"teacher_model_server_url": "http://127.0.0.1:9"},
}


class UniformTeacher:
    """A server that gives its 20 likeliest tokens the same probability."""

    requests_at_once = 1

    def score(self, ids, start):
        shape = (len(ids) - start, 20)
        tokens = np.broadcast_to(np.arange(20, dtype=np.int32), shape)
        return TopLogps(tokens, np.full(shape, np.log(1 / 20), np.float32))


@pytest.fixture
def plan_and_measure(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """Plan a task and train it for two steps; return the planned bytes and those that its steps take at most."""
    monkeypatch.setattr("slimtune.generation.teacher_server.open_teacher_server", lambda *_: UniformTeacher())
    for part in (tiny_llama(max_position_embeddings=2048), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    draws = random.Random(0)

    def text(least, most):
        return "".join(draws.choice(string.ascii_letters) for _ in range(draws.randint(least, most)))

    talks = [(text(30, 80), text(30, 100)) for _ in range(24)]
    roles = ("system", "user", "assistant")
    rows = [[{"role": r, "content": c} for r, c in zip(roles, (SYSTEM, *talk), strict=True)] for talk in talks]
    write_jsonl(tmp_path / "rows.jsonl", ({"messages": r} for r in rows))

    def run(task, **settings):
        fields = {k: str(tmp_path / "base") if v == "BASE" else v for k, v in (TASKS[task] | settings).items()}
        recipe = recipe_of({
            "model": {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "validation_fraction": 0},
            "task": {"name": task.partition(" ")[0], **fields},
            "method": {"name": "lora", "r": 4},
            "train": {"max_steps": 4, "batch_size": 6, "forgetting_budget": None},
            "output_dir": str(tmp_path / task),
        })  # fmt: skip
        plans = []

        def plan(recipe, lengths, content):
            request = build_plan_request(recipe, detect_gpu_or_cpu_spec("cpu"), lengths, 1, content)
            plans.append(estimate_resources(request, advise="none"))
            return plans[0]

        forward_backward = loss.forward_backward

        def measured(*args, **how):
            with record_function("measured step"):
                return forward_backward(*args, **how)

        for module in (training_loop, memory_probe):
            monkeypatch.setattr(module, "forward_backward", measured)
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
            train(recipe, planner=plan)
        found = done.profiler.kineto_results.events()
        times = [(e.start_ns(), e.end_ns()) for e in found if e.name() == "measured step"]
        events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
        live = list(itertools.accumulate(size for _, size in events))
        steps = [[n for (at, _), n in zip(events, live, strict=True) if a <= at <= b] for a, b in times]
        optimizer_bytes = steps[2][0] - steps[1][0]  # the longest micro-batch runs before the first step makes them
        return plans[0].allocated_bytes, max(max(steps[0]) + optimizer_bytes, *map(max, steps[1:]))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_planned_memory_is_that_of_the_run(task, plan_and_measure):
    planned, measured = plan_and_measure(task)
    assert planned == pytest.approx(measured, rel=0.02)
