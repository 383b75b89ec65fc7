"""One run of a comparison in its own process: `python -m slimtune.comparison.worker RECIPE [--trial] [--force]`.

The process boundary gives each run its own peak memory, and a crash ends that run only. A run resumes from its newest
checkpoint and ends when the process that started it ends. An error is one JSON object on stdout.
"""

import argparse
import json
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

WORKER_COMMAND = (sys.executable, "-m", "slimtune.comparison.worker")
POLL_SECONDS = 0.2
CHECKPOINT_SECONDS = 120.0
"""How long an interrupted run may take to finish its step and write a checkpoint."""


class WorkerResult(NamedTuple):
    """How a run ended.

    Args:
        error: why it failed, in one line; "" if it did not.
        stopped: whether `should_stop` ended it.
        seconds: wall-clock time.
    """

    error: str
    stopped: bool
    seconds: float


def launch_worker(
    recipe_file: Path,
    log_file: Path,
    *,
    trial: bool = False,
    force: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> WorkerResult:
    """Start a run in its own process and wait for it.

    Args:
        recipe_file: the recipe of the run.
        log_file: the run's output is appended here.
        trial: leave the test rows out.
        force: train on rows that the data report finds faulty.
        should_stop: called every fifth of a second; True ends the run at once.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run got the signal and the time to write a checkpoint.
    """
    flags = [flag for flag, is_set in (("--trial", trial), ("--force", force)) if is_set]
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
                if should_stop is not None and should_stop():
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
    if process.returncode == 130:
        raise KeyboardInterrupt
    error = "" if process.returncode == 0 else _read_error(process.returncode, output, log_file)
    return WorkerResult(error, False, time.perf_counter() - start)


def _read_error(exit_code: int, output: str, log_file: Path) -> str:
    try:
        error = json.loads(output.strip().splitlines()[-1])
        parts = [error["message"], *(f"{name}: {error[name]}" for name in ("expected", "hint") if error[name])]
        return "; ".join(" ".join(part.split()) for part in parts)
    except (IndexError, ValueError, KeyError):
        ending = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
        return f"its process {ending}; see {log_file}"


def run_cell(recipe_file: Path, *, trial: bool = False, force: bool = False) -> None:
    """Train a recipe and evaluate it on the test rows; finished steps are not repeated.

    Args:
        recipe_file: the recipe; its `output_dir` is the run folder.
        trial: only train; the caller wants the validation loss.
        force: train on rows that the data report finds faulty.

    Raises:
        SlimtuneError: training or evaluation failed.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
    """
    # Imported here because loading torch takes seconds, and the process must watch its parent from the beginning.
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
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    code = 0
    try:
        run_cell(args.recipe, trial=args.trial, force=args.force)
    except KeyboardInterrupt:
        code = 130
    except SlimtuneError as e:
        print(json.dumps({"message": e.message, "expected": e.expected, "hint": e.hint}))
        code = e.exit_code
    except Exception as e:
        traceback.print_exc()
        print(json.dumps({"message": f"{type(e).__name__}: {e}", "expected": "", "hint": ""}))
        code = 1
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for the thread that reads stdin


def _exit_with_parent() -> None:
    """Exit when stdin closes, which happens when the parent process ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
