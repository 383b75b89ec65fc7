"""Processes that train, forked from one that has imported everything: each starts in a moment, and may be killed.

The server that forks them has computed nothing: no thread of OpenMP exists that a fork would lose.
"""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from slimtune import cli
from slimtune.cli import train_command as command
from slimtune.core.training import checkpoint
from slimtune.core.training.training_loop import TrainingLoop

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "slimtune.core.training.train", "slimtune.cli.train_command", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto", "pandas", "pyarrow.ipc", "forked",
])  # fmt: skip


def start(*args: str, log: Path, **faults: Any) -> Any:
    """Start `slimtune train ARGS` with faults (see `_run`) and return the process; stderr goes to the file `log`."""
    process = CONTEXT.Process(target=_run, args=(args, log, faults))
    process.start()
    return process


def finish(*args: str, log: Path, **faults: Any) -> tuple[int, str]:
    """Run `slimtune train ARGS` to its end; return the exit code, negative for a signal, and what it printed."""
    process = start(*args, log=log, **faults)
    process.join(300)
    assert process.exitcode is not None, f"still running: {log.read_text()}"
    return process.exitcode, " ".join(log.read_text().split())


def _run(args: tuple[str, ...], log: Path, faults: dict[str, Any]) -> None:
    """Run the command in this process, without a plan, which takes longer than the run.

    Faults: `kill` (n, seconds): SIGKILL so long after the n-th step of this process has begun; n 0: after the process
    has. `checkpoint_fault` (name, n, errno): the n-th call of that function of `os` while checkpoints are written
    fails, or is SIGKILL if errno is 0. `slow`: seconds that each step takes more. `file_limit`: most bytes of a file,
    from the first step on. `stderr_dies`: nobody reads stderr from the first step on.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    step, seconds = faults.get("kill", (None, 0))
    if step == 0:
        _kill_after(seconds)
    train_step, steps = TrainingLoop.train_step, [0]

    def step_with_faults(loop: Any, rows: Any) -> Any:
        steps[0] += 1
        if steps[0] == step:
            _kill_after(seconds)
        if steps[0] == 1 and "file_limit" in faults:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_limit"], faults["file_limit"]))
        if steps[0] == 1 and "stderr_dies" in faults:
            read_end, write_end = os.pipe()
            os.dup2(write_end, 2)
            os.close(read_end)
            os.close(write_end)
        time.sleep(faults.get("slow", 0))
        return train_step(loop, rows)

    TrainingLoop.train_step = step_with_faults  # type: ignore[method-assign]
    if "checkpoint_fault" in faults:
        _fail_in_checkpoints(*faults["checkpoint_fault"])
    command.make_run_planner = lambda force: lambda *_: None
    sys.argv = ["slimtune", "train", *args]
    cli.main()


def _kill_after(seconds: float) -> None:
    def wait() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _fail_in_checkpoints(name: str, after: int, number: int) -> None:
    real, write_checkpoint, left = getattr(os, name), checkpoint.write_checkpoint, [after]

    def fail(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    def write(*args: Any) -> None:
        setattr(os, name, fail)
        try:
            write_checkpoint(*args)
        finally:
            setattr(os, name, real)

    checkpoint.write_checkpoint = write
