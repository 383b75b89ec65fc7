"""Damage inputs at random and see what comes of them: `make fuzz`, or one case again with `--only rows:17`.

Every case ends in one of these ways; only the first two are right.

    taken       the input was taken, and the result is what the input says
    refused     a SlimtuneError
    traceback   any other exception
    hang        no end after 10 seconds (changes: 60)
    silent      the input was taken, and the result is something else
    rejected    a sound input (one case of twenty) was refused
    killed      the process died: out of memory, or a crash in a library

A case depends on its kind, its number and `--seed` alone.
"""

import argparse
import collections
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS

from slimtune.errors import SlimtuneError

LIMIT_S = 10
LIMITS_S = {"changes": 60}  # a case trains
MOST_CASES = {"changes": 300}
GRACE_S = 5  # for code that does not let Python's signal handler run
MEMORY = 6 * 2**30
WRONG = ("traceback", "hang", "silent", "rejected", "killed")
Outcome = tuple[str, str]


class TimeLimit(BaseException):
    """A case takes too long; no `except Exception` may catch it."""


def stop_case(*_: Any) -> None:
    raise TimeLimit


def run_case(kind: str, number: int, seed: int, verbose: bool = False) -> Outcome:
    """Run one case; return how it ended, and the message."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        sys.set_int_max_str_digits(0)  # to write long integers; they are read under the usual limit
        rng = random.Random(f"{seed}/{kind}/{number}")
        changes = rng.choice([1, 1, 1, 2, 2, 3]) if number % 20 else 0
        work = KINDS[kind](rng, Path(name), changes)
        sys.set_int_max_str_digits(4300)
        if verbose:
            for file in sorted(Path(name).iterdir()):
                print(f"--- {file.name}\n{file.read_bytes()[:3000]!r}")
        signal.signal(signal.SIGALRM, stop_case)
        limit = LIMITS_S.get(kind, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            error = work()
            outcome = ("silent", error) if error else ("taken", "")
        except SlimtuneError as error:
            outcome = ("refused" if changes else "rejected", f"{type(error).__name__}: {error.message}")
        except TimeLimit:
            outcome = ("hang", f"no end after {limit} s")
        except BaseException as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/slimtune/" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            outcome = ("traceback", f"{type(error).__name__}: {str(error)[:200]} ({place})")
            if verbose:
                traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return outcome


def run_cases(kind: str, first: int, last: int, seed: int, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,) * 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(first, last):
        results.send((number, "started", ""))
        results.send((number, *run_case(kind, number, seed)))


def fuzz_kind(kind: str, cases: int, seed: int) -> dict[int, Outcome]:
    """Run the cases of one kind, in a process that is replaced when it hangs or dies."""
    context = multiprocessing.get_context("fork")
    outcomes: dict[int, Outcome] = {}
    KINDS[kind](random.Random(0), Path(tempfile.mkdtemp(prefix="fuzz-")), 0)  # what is cached is made once, here
    while len(outcomes) < cases:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_cases, args=(kind, len(outcomes), cases, seed, sender), daemon=True)
        process.start()
        sender.close()
        number = len(outcomes)
        try:
            while receiver.poll(LIMITS_S.get(kind, LIMIT_S) + GRACE_S):
                number, how, message = receiver.recv()
                if how != "started":
                    outcomes[number] = (how, message)
            ended = "hang"
        except EOFError:
            ended = "killed"
        process.kill()
        process.join()
        if len(outcomes) < cases:
            outcomes[len(outcomes)] = (ended, f"exit code {process.exitcode}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=10_000, help="in all, shared by the kinds; 300 of changes (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--only", help="one case, with its input and traceback: KIND:NUMBER")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    args = parser.parse_args()
    if args.only:
        kind, number = args.only.split(":")
        print(*run_case(kind, int(number), args.seed, verbose=True))
        return 0
    all_outcomes: dict[str, dict[int, Outcome]] = {}
    columns = ("taken", "refused", *WRONG)
    print(f"{'kind':16}{'cases':>7}" + "".join(f"{c:>11}" for c in columns) + "    seconds")
    for kind in args.kinds:
        started = time.perf_counter()
        cases = min(args.cases // len(args.kinds), MOST_CASES.get(kind, args.cases))
        outcomes = all_outcomes[kind] = fuzz_kind(kind, cases, args.seed)
        count = collections.Counter(how for how, _ in outcomes.values())
        figures = "".join(f"{count[c]:>11}" for c in columns)
        print(f"{kind:16}{len(outcomes):>7}{figures}{time.perf_counter() - started:>11.0f}", flush=True)
    wrong = {f"{k}:{n}": o for k, all_ in all_outcomes.items() for n, o in all_.items() if o[0] in WRONG}
    for name, (how, message) in wrong.items():
        print(f"{name} {how}: {message}")
    if args.json:
        args.json.write_text(json.dumps(all_outcomes, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
