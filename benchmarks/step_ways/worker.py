"""The worker's side of `benchmarks/step.py`: a way to train in a process of its own, which runs when it is told to.

    stdin    go N                 run the steps of round N
    stdout   {"ready": true, …}   once; then one JSON object for each round

While another worker runs, this one waits on stdin. Whatever a library prints goes to stderr. Nothing of slimtune is
imported here: the peers' workers run without it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, list[int]]
PACKAGES = ("torch", "transformers", "slimtune", "peft", "trl")


class Turns:
    """What this worker is to do, and its talk with `step.py`.

    `spec`: see `step.py`; `way`: the worker's name; `rounds[n][s]`: the rows of step s of round n.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
        self.way = sys.argv[2]
        rows = self.spec["rows"]
        self.rounds = [[[rows[i] for i in step] for step in steps] for steps in self.spec["rounds"]]
        self._before, self._processor = 0, 0.0
        torch.manual_seed(self.spec["seed"])

    def ready(self, **facts: Any) -> None:
        """Say that training can begin."""
        self._before = resident("VmRSS")
        libraries = {name: found for name in PACKAGES if (found := _version(name)) and name in sys.modules}
        threads = torch.get_num_threads()
        self._say({"ready": True, "versions": libraries, "threads": threads, "before_bytes": self._before, **facts})

    def wait(self) -> int | None:
        """Wait for a turn; return the number of its round, None when there is none any more."""
        line = sys.stdin.readline()
        self._processor = time.process_time()
        return int(line.split()[1]) if line.startswith("go") else None

    def done(self, number: int, seconds: float, losses: list[float], positions: int, **facts: Any) -> None:
        """Report a round. `losses`: of each step; `positions`: columns that went through the layers."""
        rows = [row for step in self.rounds[number] for row in step]
        self._say(
            {
                "seconds": seconds,
                "processor_seconds": time.process_time() - self._processor,
                "rows": len(rows),
                "tokens": sum(len(row["input_ids"]) for row in rows),
                "supervised": sum(learned(row) for row in rows),
                "positions": positions,
                "losses": losses,
                "peak_rss_bytes": resident("VmHWM"),
                "before_bytes": self._before,
                **facts,
            }
        )

    def _say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._out, flush=True)


def serve(
    turns: Turns, model: Any, passes_of: Callable[[list[Row]], Iterable], loss_of: Callable, **facts: Any
) -> None:
    """Train in turns by a plain loop: each pass forwards and backwards, clip, fused AdamW.

    Args:
        turns: the talk.
        model: what is trained.
        passes_of: a step's rows → `(batch, positions)` of each pass.
        loss_of: `(model, batch, supervised tokens of the whole step)` → the pass's share of the step's loss.
        facts: said with `ready`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=turns.spec["learning_rate"], weight_decay=0.0, fused=True)
    model.train()
    turns.ready(trained=sum(p.numel() for p in trained), **facts)
    while (number := turns.wait()) is not None:
        losses, positions = [], 0
        began = time.perf_counter()
        for rows in turns.rounds[number]:
            supervised, loss = sum(map(learned, rows)), 0.0
            for batch, columns in passes_of(rows):
                part = loss_of(model, batch, supervised)
                part.backward()
                loss, positions = loss + part.item(), positions + columns
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        turns.done(number, time.perf_counter() - began, losses, positions)


def learned(row: Row) -> int:
    """How many of a row's tokens are supervised: its first has nothing before it."""
    return sum(label != -100 for label in row["labels"][1:])


def parted(rows: list[Row], count: int) -> list[list[Row]]:
    """Rows in so many parts of like length, the longest first into the shortest part."""
    parts: list[list[Row]] = [[] for _ in range(min(count, len(rows)))]
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        min(parts, key=lambda part: sum(len(r["input_ids"]) for r in part)).append(row)
    return parts


def resident(what: str) -> int:
    """Bytes of memory this process holds: "VmRSS" now, "VmHWM" at most so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: the peak alone is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # `ru_maxrss` of a young process is that of the one it was forked from; these are its own.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
