"""Runs of a comparison in their own process: `python -m slimtune.experiments.run_worker RECIPE… [--trial] [--force]`.

The process boundary gives a run its own peak memory, and a crash ends that run only. Several recipes train at once on
one base (simultaneous_runs.py). A run resumes from its newest checkpoint and ends when the process that started it
ends. An error is one JSON object on stdout, with the recipe's file as `recipe` if there are several.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.foundation.files import parse_json, to_json
from ..core.foundation.remote_code import allowing_remote_code
from ..errors import SlimtuneError

WORKER_COMMAND = (sys.executable, "-m", "slimtune.experiments.run_worker")
POLL_SECONDS = 0.2
CHECKPOINT_SECONDS = 120.0
"""How long an interrupted run may take to finish its step and write a checkpoint."""
STOP_SUFFIX = ".stop"
"""Of a file beside a recipe that ends its run, which trains with others in one process."""
RESTARTS = 2
"""How often a run whose process was killed is started again, where several train at a time."""


class WorkerResult(NamedTuple):
    """How a run ended."""

    error: str  # why it failed, in one line; "" if it did not
    stopped_by_should_stop: bool  # whether `should_stop` ended it
    seconds: float  # wall-clock time
    errors_by_recipe_file: Mapping[str, str] = {}  # of several runs: why single ones failed, by their recipe files
    killed: bool = False  # whether a signal ended its process
    restarts: int = 0  # how often it was started again because it was killed


Launch = Callable[..., WorkerResult]
"""A partial of `train_recipes_at_once_in_subprocess` that lacks `environment` and `should_stop`."""


def train_recipes_at_once_in_subprocess(
    recipe_files: Sequence[Path],
    *,
    skip_test_evaluation: bool = False,
    allow_faulty_rows: bool = False,
    trust_remote_code: bool = False,
    environment: Mapping[str, str] = {},
    should_stop: Callable[[], bool] = lambda: False,
) -> WorkerResult:
    """Start runs in a process of their own and wait for it; on Ctrl-C it gets the time to write checkpoints.

    Args:
        recipe_files: the recipes of the runs, which train at the same time; the output goes to a log beside the first.
        skip_test_evaluation: leave the test rows out.
        allow_faulty_rows: train on rows that the data report finds faulty.
        trust_remote_code: let the base run Python code that comes with it.
        environment: variables that the process has besides those of this one.
        should_stop: called every fifth of a second; True ends the process at once.
    """
    given = {"--trial": skip_test_evaluation, "--force": allow_faulty_rows, "--trust-remote-code": trust_remote_code}
    flags = [flag for flag, is_set in given.items() if is_set]
    start, log_file = time.perf_counter(), recipe_files[0].with_suffix(".log")
    # The worker's stdin stays open as long as this process lives; the worker ends when it closes. The worker gets a
    # session of its own so that Ctrl-C in the terminal reaches it once, from here, and not twice.
    with (
        log_file.open("a") as log,
        subprocess.Popen(
            [*WORKER_COMMAND, *map(str, recipe_files), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
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
    error, failed = "", {}
    if code != 0:
        try:
            for line in output.strip().splitlines()[-len(recipe_files) :]:
                fields = parse_json(line)
                parts = [fields["message"], *(f"{n}: {fields[n]}" for n in ("expected", "hint") if fields[n])]
                error = "; ".join(" ".join(part.split()) for part in parts)
                if "recipe" in fields:
                    failed[fields["recipe"]], error = error, ""
        except (ValueError, KeyError):
            error = ""
        if not error and not failed:
            ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            ending += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            error = f"its process {ending}; see {log_file}"
    return WorkerResult(error, False, time.perf_counter() - start, failed, killed=code < 0)


def run_worker_with_restarts_if_killed(start_worker: Launch, **worker_options: Any) -> WorkerResult:
    """Call a partial of `train_recipes_at_once_in_subprocess`, again if the process was killed.

    It resumes from its checkpoint. Beside other runs memory may run out that suffices later.
    """
    start, restarts = time.perf_counter(), 0
    while (result := start_worker(**worker_options)).killed and restarts < RESTARTS:
        restarts += 1
    return result._replace(restarts=restarts, seconds=time.perf_counter() - start)


def train_and_test_recipes_returning_errors(
    recipe_files: Sequence[Path], *, skip_test_evaluation: bool = False, allow_faulty_rows: bool = False
) -> dict[Path, SlimtuneError]:
    """Train recipes at once and, unless they are trials, evaluate them on the test rows; return the errors by recipe.

    Steps that are finished are not repeated.
    """
    # Imported here because loading torch takes seconds, and the process must watch its parent from the start.
    from ..core.config import load_recipe
    from ..core.training.run_dir import RunDir
    from ..evaluation.evaluate import EvalSettings, evaluate
    from .simultaneous_runs import RunStoppedOutcome, train_recipes_together

    recipes = {file: load_recipe(file) for file in recipe_files}
    runs = {file: RunDir(Path(recipe.output_dir)) for file, recipe in recipes.items()}
    resume: dict[Path, bool] = {}
    for file, run in runs.items():
        if not run.result_file.is_file():
            resume[file] = run.checkpoints.is_dir() or run.recipe_file.is_file()
            if run.path.is_dir() and not resume[file]:
                shutil.rmtree(run.path)  # the process was killed before it wrote anything to resume from
    stop_files = {str(recipes[file].output_dir): file.with_suffix(STOP_SUFFIX) for file in recipe_files}
    outcomes = train_recipes_together(
        [recipes[file] for file in resume],
        resume=list(resume.values()),
        allow_faulty_rows=allow_faulty_rows,
        should_stop=lambda recipe: stop_files[str(recipe.output_dir)].exists(),
    )
    ended = {file: o for file, o in zip(resume, outcomes, strict=True) if isinstance(o, SlimtuneError)}
    failed = {file: o for file, o in ended.items() if not isinstance(o, RunStoppedOutcome)}
    for file in (file for file in recipe_files if file not in ended):
        if not skip_test_evaluation:
            evaluate(runs[file].path, EvalSettings(split="test", skip_prompt_test=True))  # only losses are compared
        shutil.rmtree(runs[file].checkpoints, ignore_errors=True)
    return failed


def main() -> None:
    """Run the cells that the arguments name and exit: 0 done, 1 or 2 as the error says, 130 interrupted."""
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    files = [Path(argument) for argument in sys.argv[1:] if argument not in flags]
    how = {"skip_test_evaluation": "--trial" in flags, "allow_faulty_rows": "--force" in flags}
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # Ray blocks SIGINT in its processes, and this one inherits that; then Ctrl-C would write no checkpoint.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    code = 0
    try:
        with allowing_remote_code("--trust-remote-code" in flags):
            for file, error in train_and_test_recipes_returning_errors(files, **how).items():
                _print_error(error, **({"recipe": str(file)} if len(files) > 1 else {}))
                code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as e:
        if not isinstance(e, SlimtuneError):
            traceback.print_exc()
            e = SlimtuneError(f"{type(e).__name__}: {e}")
        _print_error(e)
        code = e.exit_code
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for the thread that reads stdin


def _print_error(error: SlimtuneError, **more: str) -> None:
    print(to_json({"message": error.message, "expected": error.expected, "hint": error.hint, **more}))


def _exit_with_parent() -> None:
    """Exit when stdin closes, which happens when the parent process ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
