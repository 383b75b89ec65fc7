"""One run of a comparison in its own process: `python -m slimtune.comparison.worker RECIPE [--trial] [--force]`.

The process boundary gives each run its own peak memory, and a crash ends that run only. A run resumes from its newest
checkpoint and ends when the process that started it ends. An error is one JSON object on stdout.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import SlimtuneError
from ..utils.files import parse_json, to_json
from ..utils.remote_code import allow_remote_code, remote_code_allowed

WORKER_COMMAND = (sys.executable, "-m", "slimtune.comparison.worker")
POLL_SECONDS = 0.2
CHECKPOINT_SECONDS = 120.0
"""How long an interrupted run may take to finish its step and write a checkpoint."""


class WorkerResult(NamedTuple):
    """How a run ended."""

    error: str  # why it failed, in one line; "" if it did not
    stopped: bool  # whether `should_stop` ended it
    seconds: float  # wall-clock time


def launch_worker(
    recipe_file: Path,
    log_file: Path,
    *,
    trial: bool = False,
    force: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> WorkerResult:
    """Start a run in its own process and wait for it; on Ctrl-C it gets the time to write a checkpoint.

    Args:
        recipe_file: the recipe of the run.
        log_file: the run's output is appended here.
        trial: leave the test rows out.
        force: train on rows that the data report finds faulty.
        should_stop: called every fifth of a second; True ends the run at once.
    """
    trust = remote_code_allowed()
    flags = [f for f, is_set in (("--trial", trial), ("--force", force), ("--trust-remote-code", trust)) if is_set]
    start = time.perf_counter()
    # The worker's stdin stays open as long as this process lives; the worker ends when it closes. The worker gets a
    # session of its own so that Ctrl-C in the terminal reaches it once, from here, and not twice.
    with (
        log_file.open("a") as log,
        subprocess.Popen(
            [*WORKER_COMMAND, str(recipe_file), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            while process.poll() is None:
                if should_stop():
                    process.kill()
                    process.wait()
                    return WorkerResult("", True, time.perf_counter() - start)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            try:
                process.send_signal(signal.SIGINT)
                process.wait(CHECKPOINT_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
            raise
        output = process.stdout.read() if process.stdout is not None else ""
    code = process.returncode
    if code == 130:
        raise KeyboardInterrupt
    error = ""
    if code != 0:
        try:
            fields = parse_json(output.strip().splitlines()[-1])
            parts = [fields["message"], *(f"{name}: {fields[name]}" for name in ("expected", "hint") if fields[name])]
            error = "; ".join(" ".join(part.split()) for part in parts)
        except (IndexError, ValueError, KeyError):
            ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            ending += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            error = f"its process {ending}; see {log_file}"
    return WorkerResult(error, False, time.perf_counter() - start)


def run_cell(recipe_file: Path, *, trial: bool = False, force: bool = False) -> None:
    """Train a recipe and, unless it is a trial, evaluate it on the test rows; finished steps are not repeated."""
    # Imported here because loading torch takes seconds, and the process must watch its parent from the start.
    from ..config import load_recipe
    from ..evaluation.evaluate import EvalSettings, evaluate
    from ..run_dir import RunDir
    from ..training.train import train

    recipe = load_recipe(recipe_file)
    run = RunDir(Path(recipe.output_dir))
    if not run.result_file.is_file():
        can_resume = run.checkpoints.is_dir() or run.recipe_file.is_file()
        if run.path.is_dir() and not can_resume:
            shutil.rmtree(run.path)  # the process was killed before it wrote anything to resume from
        train(recipe, resume=can_resume, force=force)
    if not trial:
        evaluate(run.path, EvalSettings(split="test", skip_prompt_test=True))  # only losses are compared
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def main() -> None:
    """Run the cell that the arguments name and exit: 0 done, 1 or 2 as the error says, 130 interrupted."""
    recipe_file, *flags = sys.argv[1:]
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    code = 0
    try:
        with allow_remote_code("--trust-remote-code" in flags):
            run_cell(Path(recipe_file), trial="--trial" in flags, force="--force" in flags)
    except KeyboardInterrupt:
        code = 130
    except Exception as e:
        if not isinstance(e, SlimtuneError):
            traceback.print_exc()
            e = SlimtuneError(f"{type(e).__name__}: {e}")
        print(to_json({"message": e.message, "expected": e.expected, "hint": e.hint}))
        code = e.exit_code
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for the thread that reads stdin


def _exit_with_parent() -> None:
    """Exit when stdin closes, which happens when the parent process ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
