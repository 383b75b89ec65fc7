"""Peak memory of tasks with a teacher beside sft's on the same rows, and beside the plan, on a real base.

    python benchmarks/teacher_memory.py [TASK …] [--base smollm2-135m] [--steps 2]

    planned    what `slimtune train` plans for the run
    measured   the most that torch had allocated in a step, sampling of answers included, or in the longest micro-batch
               before the first one with the optimizer's state that the first one makes: sums of the `[memory]` events
               of its profiler
    of sft's   measured, divided by the same of `sft`

Rows are chats with answers of 40 to 60 words, of which the longest one is how long sampled answers may be. Each task
runs in a process of its own. Exit code 1: a plan is off by more than 2 %, or a task without a second model needs more
than 1.1 times what sft needs.
"""

import argparse
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler would write to stderr

from torch.profiler import ProfilerActivity, profile, record_function

from slimtune.core.config import Recipe
from slimtune.core.foundation.formatting import format_bytes
from slimtune.core.models.loader import load_tokenizer
from slimtune.core.training.train import train
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.planning import memory_probe
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

CONTEXT = Path(__file__).parent / "data/shop_context.txt"
WORDS = "time year people way day man thing woman life child world school state family student group".split()  # noqa: SIM905
TASKS: dict[str, dict[str, Any]] = {
    "sft": {},
    "context": {"context": str(CONTEXT)},
    "sdft": {"lmbda": 1},
    "distill": {"lmbda": 0, "teacher_model_name_or_path": "BASE"},
}
WITHOUT_SECOND_MODEL = ("context", "sdft")
WORST_ERROR, MOST_OF_SFT = 0.02, 1.1


def make_rows(count: int) -> list[list[dict[str, str]]]:
    """Return chats of random words."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [
        [{"role": "user", "content": text(20, 40)}, {"role": "assistant", "content": text(40, 60)}]
        for _ in range(count)
    ]


def measure(task: str, base: str, steps: int, folder: Path) -> dict[str, int]:
    """Train a task for some steps; return the planned bytes and those that a step took at most."""
    rows = make_rows(24)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = load_tokenizer(base)
    longest = max(len(tokenizer(row[1]["content"])["input_ids"]) + 2 for row in rows)
    settings = {key: base if value == "BASE" else value for key, value in TASKS[task].items()}
    settings |= {} if task == "sft" else {"max_completion_length": longest}
    recipe = Recipe.from_dict({
        "model": {"name": base, "dtype": "float32", "device": "cpu"},
        "data": {"train": str(file), "max_seq_len": 2048},
        "task": {"name": task, **settings},
        "train": {"max_steps": steps, "batch_size": 8, "forgetting_budget": None},
        "output_dir": str(folder / task),
    })  # fmt: skip
    planned: list[int] = []

    def plan(recipe: Any, lengths: Any, content: Any) -> Any:
        request = build_plan_request(recipe, detect_gpu_or_cpu_spec("cpu"), lengths, 1, content)
        found = estimate_resources(request, advise="none")
        planned.append(found.allocated_bytes)
        return found

    def measuring(function: Any) -> Any:
        def measured(*args: Any, **how: Any) -> Any:
            with record_function("measured step"):
                return function(*args, **how)

        return measured

    TrainingLoop.train_step = measuring(TrainingLoop.train_step)  # type: ignore[method-assign]
    memory_probe.forward_backward = measuring(memory_probe.forward_backward)  # the longest micro-batch
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        train(recipe, planner=plan)
    found = done.profiler.kineto_results.events()  # type: ignore[union-attr]
    times = [(e.start_ns(), e.end_ns()) for e in found if e.name() == "measured step"]
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    live = [*itertools.accumulate(size for _, size in events)]
    steps_live = [[n for (at, _), n in zip(events, live, strict=True) if a <= at <= b] for a, b in times]
    longest, *others = [max(each) for each in steps_live]
    optimizer_bytes = steps_live[1][-1] - steps_live[1][0]
    return {"planned": planned[0], "measured": max(longest + optimizer_bytes, *others)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], help="default: all")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(args.one, args.base, args.steps, Path(scratch))))
        return 0
    print("| task | planned | measured | plan / measured | of sft's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    found, off = {}, False
    for task in dict.fromkeys(["sft", *(args.tasks or TASKS)]):
        same = ["--base", args.base, "--steps", str(args.steps)]
        command = [sys.executable, __file__, "--one", task, *same]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = found[task] = json.loads(done.stdout.splitlines()[-1])
        ratio, of_sft = one["planned"] / one["measured"], one["measured"] / found["sft"]["measured"]
        off |= abs(ratio - 1) > WORST_ERROR or (task in WITHOUT_SECOND_MODEL and of_sft > MOST_OF_SFT)
        sizes = f"{format_bytes(one['planned'])} | {format_bytes(one['measured'])}"
        print(f"| `{task}` | {sizes} | {ratio:.3f} | {of_sft:.3f} |", flush=True)
    return int(off)


if __name__ == "__main__":
    sys.exit(main())
