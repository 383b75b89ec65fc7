"""Where the runs of a comparison or a search train: here, one after another or N at a time. `clusters.py` has others.

Each executor calls a partial of `train_recipes_at_once_in_subprocess`, which starts the run in a process of its own,
here or on another machine. A run reads its recipe from a folder that all machines share, and writes its results there,
so an executor moves no data, and the same command continues with what it finds in the folder.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Protocol, Self, TypeVar

from ..core.foundation.cpu import count_usable_cpus
from ..errors import RunError, UsageError
from .run_worker import CHECKPOINT_SECONDS, POLL_SECONDS, Launch, WorkerResult, run_worker_with_restarts_if_killed

SHARED_FILE_SECONDS = 60.0
MOST_THREADS = 64
T = TypeVar("T")


@dataclass(frozen=True)
class ExecutorSpec:
    """What `--on` says."""

    text: str
    kind: str  # a name of `executor_specs.EXECUTORS`
    max_parallel_runs: int | None  # how many train at the same time at most; None: as many as Ray or Slurm starts
    address: str | None = None  # of a Ray cluster, "ray://…"
    parameters: Mapping[str, str] = field(default_factory=dict)  # of a Ray task or a Slurm job


class SubmittedRun(Protocol):
    """A run that was handed to an executor."""

    def done(self) -> bool:
        """Return whether it has ended; it is asked again and again."""

    def result(self) -> WorkerResult:
        """Return how it ended."""

    def cancel(self) -> None:
        """End it, or never begin it; a run that trains gets the time to write a checkpoint."""


def _return_error(function: Callable[[], T]) -> T | RunError:
    """Return what a function returns, or the RunError that it raises."""
    try:
        return function()
    except RunError as error:
        return error


class Executor:
    """One run after another on this machine, each with all of its cores.

    Use it in a `with` block, which cancels what still runs when it is left by an exception.

    Attributes:
        runs: how many train at the same time at most; None: no limit is known.
        runs_per_device: how many of them have the same GPU, or this machine's CPU.
        is_remote: whether runs may train on other machines than this one.
    """

    max_parallel_runs: int | None = 1
    runs_per_device = 1
    is_remote = False

    def run(
        self, launches: Iterable[tuple[Path, Launch]], should_stop: Callable[[Path], bool] = lambda _: False
    ) -> Iterator[tuple[Path, WorkerResult]]:
        """Run recipes and give the result of each, by its file, when it ends.

        Args:
            launches: the file of each recipe and what starts it; the next is taken when it can start.
            should_stop: called again and again for each run that was started; True ends it.
        """
        # In the main thread, so that Ctrl-C reaches the run by train_recipes_at_once_in_subprocess alone.
        for file, launch in launches:
            yield file, launch(should_stop=partial(should_stop, file))

    def call_all(self, functions: Sequence[Callable[[], T]]) -> Iterator[T | RunError]:
        """Call functions that use this executor, at the same time where it may; give what each returns or raises."""
        yield from map(_return_error, functions)

    def wait_for_files(self, files: Iterable[Path]) -> None:
        """Wait until this machine sees the files that a run has written."""

    def cancel(self) -> None:
        """End all runs, and wait until those that train have written their checkpoints."""

    def close(self) -> None:
        """Give back what the executor holds; nothing runs any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self.cancel()
        finally:
            self.close()


class ParallelExecutorBase(Executor):
    """Several runs at the same time.

    Args:
        spec: what `--on` says.
        folder: of the comparison or the search, which every machine must see under this path.

    Attributes:
        package: what it needs; the extra of slimtune that brings it is called as `--on` calls the place.
        takes_address, takes_parameters: whether `--on` may name an address, and parameters.
    """

    package: str | None = None
    takes_address = False
    takes_parameters = True

    def __init__(self, spec: ExecutorSpec, folder: Path) -> None:
        self.spec, self.folder, self.runs = spec, folder, spec.max_parallel_runs
        self.unfinished: dict[Path, SubmittedRun] = {}
        self.cancelled = False

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        """Raise UsageError if `--on` lacks something, or has a parameter that does not exist."""
        raise NotImplementedError

    def submit(self, recipe_file: Path, launch: Launch) -> SubmittedRun:
        """Start a run, or have it start later, and return at once."""
        raise NotImplementedError

    def run(
        self, launches: Iterable[tuple[Path, Launch]], should_stop: Callable[[Path], bool] = lambda _: False
    ) -> Iterator[tuple[Path, WorkerResult]]:
        waiting, tasks, stopped = iter(launches), dict[Path, SubmittedRun](), set[Path]()
        while True:
            while (self.runs is None or len(tasks) < self.runs) and (item := next(waiting, None)) is not None:
                tasks[item[0]] = self.unfinished[item[0]] = self.submit(*item)
            if not tasks:
                return
            for file, task in list(tasks.items()):
                if self.cancelled:
                    raise KeyboardInterrupt
                if task.done():
                    del tasks[file], self.unfinished[file]
                    yield file, WorkerResult("", True, 0.0) if file in stopped else task.result()
                elif file not in stopped and should_stop(file):
                    stopped.add(file)
                    task.cancel()
            time.sleep(POLL_SECONDS)

    def call_all(self, functions: Sequence[Callable[[], T]]) -> Iterator[T | RunError]:
        threads = ThreadPoolExecutor(min(self.runs or MOST_THREADS, max(1, len(functions))))
        futures = [threads.submit(copy_context().run, _return_error, function) for function in functions]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            self.cancel()
            raise
        threads.shutdown()

    def wait_for_files(self, files: Iterable[Path]) -> None:
        # A shared file system may remember for some seconds that a file was missing.
        deadline = time.monotonic() + (SHARED_FILE_SECONDS if self.is_remote else 0)
        while time.monotonic() < deadline and not all(file.is_file() for file in files):
            time.sleep(POLL_SECONDS)

    def cancel(self) -> None:
        self.cancelled = True
        for task in list(self.unfinished.values()):
            task.cancel()
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        with suppress(RunError):  # the connection to the runs is lost
            while time.monotonic() < deadline and not all(task.done() for task in list(self.unfinished.values())):
                time.sleep(POLL_SECONDS)


@dataclass
class LocalTask:
    """A run in a thread that waits for its process."""

    future: "Future[WorkerResult]"
    cancel_event: Event

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> WorkerResult:
        return self.future.result()

    def cancel(self) -> None:
        self.cancel_event.set()


class LocalParallelExecutor(ParallelExecutorBase):
    """N runs at a time on this machine: each on its share of the cores, and the GPUs in turn."""

    takes_parameters = False

    def __init__(self, spec: ExecutorSpec, folder: Path) -> None:
        super().__init__(spec, folder)
        from torch.cuda import device_count

        runs = spec.max_parallel_runs or 1
        self.threads = ThreadPoolExecutor(runs)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = visible.split(",") if visible else [str(i) for i in range(device_count())]
        self.runs_per_device = math.ceil(runs / max(1, len(self.gpus)))
        self.environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        # More threads than cores would wait for one another at the end of each product.
        cores = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count_usable_cpus() // runs)))}
        for i in range(runs):
            gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[i % len(self.gpus)]} if self.gpus else {}
            self.environments.put({**cores, **gpu})

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        if spec.max_parallel_runs is None:
            message = f"--on {spec.text} does not say how many runs train at the same time"
            raise UsageError(message, "a number, as local:4")

    def submit(self, recipe_file: Path, launch: Launch) -> SubmittedRun:
        cancelled = Event()

        def raise_if_cancelled() -> bool:
            if cancelled.is_set():
                raise KeyboardInterrupt  # the run gets the time to write a checkpoint
            return False

        def run() -> WorkerResult:
            raise_if_cancelled()
            environment = self.environments.get()
            try:
                return run_worker_with_restarts_if_killed(
                    launch, environment=environment, should_stop=raise_if_cancelled
                )
            finally:
                self.environments.put(environment)

        return LocalTask(self.threads.submit(run), cancelled)

    def close(self) -> None:
        self.threads.shutdown(wait=False)
