"""The orchestrator's side of `benchmarks/step.py`: a process for each way, and turns among them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import tables

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Worker:
    """A way's process: started, waited for, run in turns, ended."""

    def __init__(self, way: str, spec: Path, peers: str) -> None:
        family = way.split("-")[0]
        theirs = family in ("peft", "trl")
        file = f"{family}_ways.py" if theirs else "ceiling.py" if way == "ceiling" else "ours.py"
        self.way, self.log = way, spec.with_suffix(f".{way}.log").open("w+")
        command = [peers if theirs else sys.executable, str(HERE / file), str(spec), way]
        environment, pipe = {**os.environ, **OFFLINE}, subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment)

    def answer(self) -> dict[str, Any]:
        """Wait for its next line."""
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            code = self.process.wait()
            why = " (killed: is the machine out of memory? --ways takes fewer at once)" if code == -9 else ""
            raise SystemExit(f"{self.way} ended with {code}{why}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def turn(self, number: int) -> dict[str, Any]:
        """Run a round."""
        self.process.stdin.write(f"go {number}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let it go."""
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def in_turns(ways: list[str], spec: Path, beside: str | None, rounds: int, peers: str) -> dict[str, Any]:
    """Run ways round by round, each once a round; return their figures, the first way being what they stand beside.

    Args:
        ways: names.
        spec: what the workers read.
        beside: the way right before and after which the ceiling is measured; None: no ceiling.
        rounds: how many after the one that warms up.
        peers: the peers' Python.
    """
    say(f"starting {', '.join(ways)}")
    workers = {name: Worker(name, spec, peers) for name in [*ways, *(["ceiling"] if beside else [])]}
    found: dict[str, list] = {name: [] for name in ways}
    ceiling: list[list] = [[], []]
    try:
        said = {name: worker.answer() for name, worker in workers.items()}
        for number in range(rounds + 1):
            for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
                if name == beside:
                    ceiling[0].append(workers["ceiling"].turn(number))
                found[name].append(workers[name].turn(number))
                if name == beside:
                    ceiling[1].append(workers["ceiling"].turn(number))
            took = ", ".join(f"{name} {done[-1]['seconds']:.1f} s" for name, done in found.items())
            say(f"round {number} of {rounds}: {took}" + (" (warms up)" if number == 0 else ""))
    finally:
        for worker in workers.values():
            worker.end()
    result: dict[str, Any] = {"ways": {name: tables.figures(said[name], found[name]) for name in ways}}
    tables.compare(result["ways"], ways[0])
    if beside:
        result["ceiling"] = {"beside": beside, **tables.share_of_ceiling(ceiling, found[beside])}
    return result


def say(what: str) -> None:
    """Tell the person; stdout is for the tables."""
    print(what, file=sys.stderr, flush=True)
