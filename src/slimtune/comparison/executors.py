"""Where the runs of a comparison or a search train: here one after another or N at a time, on Ray, or on Slurm.

Each executor calls a partial of `worker.launch_worker`, which starts the run in a process of its own, here or on
another machine. A run reads its recipe from a folder that all machines share, and writes its results there, so an
executor moves no data, and the same command continues with what it finds in the folder. Ray and Slurm decide when and
where a run starts.
"""

import logging
import math
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol, Self, TypeVar

from ..data.parallel import cpu_count
from ..errors import RunError, UsageError, install_command, nearest
from ..utils.files import read_json, write_json
from .worker import CHECKPOINT_SECONDS, POLL_SECONDS, RESTARTS, WorkerResult, launch_again_if_killed

Launch = Callable[..., WorkerResult]
"""A partial of `launch_worker` that lacks `environment` and `should_stop`."""
PLACES = "local:4, ray, ray://HOST:PORT, or slurm:partition=NAME,time=MINUTES"
PACKAGES = {"ray": "ray", "slurm": "submitit"}
SHARED_FILE_SECONDS = 60.0
MOST_THREADS = 64
T = TypeVar("T")
RAY_PARAMETERS = ("num_cpus", "num_gpus")
CARRIED = ("HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "SLIMTUNE_TRACES",
           "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # fmt: skip
"""Variables that a run on Ray gets from this process; Slurm passes the whole environment."""


@dataclass(frozen=True)
class Place:
    """What `--on` says."""

    text: str
    kind: str  # "local", "ray" or "slurm"
    runs: int | None  # how many train at the same time at most; None: as many as Ray or Slurm starts
    address: str | None = None  # of a Ray cluster, "ray://…"
    parameters: Mapping[str, str] = field(default_factory=dict)  # of a Ray task or a Slurm job


def parse_place(text: str) -> Place:
    """Parse `local:4`, `ray`, `ray:4,num_gpus=1`, `ray://host:10001` or `slurm:4,partition=gpu,time=60`.

    Raises:
        UsageError: it has another form, or the package that it needs is not installed.
    """
    kind, _, rest = text.partition(":")
    if kind not in ("local", *PACKAGES):
        raise UsageError(f"--on {text}: no such place{nearest(kind, ('local', *PACKAGES))}", PLACES)
    address, runs, parameters = None, None, {}
    for item in filter(None, (item.strip() for item in rest.split(","))):
        name, is_set, value = item.partition("=")
        if is_set and value and kind != "local":
            parameters[name] = value
        elif re.fullmatch("[1-9][0-9]{0,3}", item) and runs is None:
            runs = int(item)
        elif item.startswith("//") and kind == "ray" and address is None:
            address = f"ray:{item}"
        else:
            raise UsageError(f"--on {text}: {item} is not understood", PLACES)
    for name, value in parameters.items() if kind == "ray" else ():
        if name not in RAY_PARAMETERS:
            raise UsageError(f"--on {text}: no such parameter: {name}{nearest(name, RAY_PARAMETERS)}")
        if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", value):
            raise UsageError(f"--on {text}: {name} is {value}", "a number, as 1 or 0.5")
    if kind == "local" and runs is None:
        raise UsageError(f"--on {text} does not say how many runs train at the same time", "a number, as local:4")
    if kind == "slurm" and not re.fullmatch("[1-9][0-9]{0,5}", parameters.get("time", "")):
        expected = "the minutes after which Slurm may end a run, as slurm:partition=gpu,time=240"
        raise UsageError(f"--on {text} lacks time", expected, "submitit's own default is 5 minutes")
    if kind in PACKAGES and find_spec(PACKAGES[kind]) is None:
        raise UsageError(f"--on {text} needs {PACKAGES[kind]}, not installed here", hint=install_command(kind))
    return Place(text, kind, runs, address, parameters)


class Task(Protocol):
    """A run that was handed to an executor."""

    def done(self) -> bool:
        """Return whether it has ended; it is asked again and again."""

    def result(self) -> WorkerResult:
        """Return how it ended."""

    def cancel(self) -> None:
        """End it, or never begin it; a run that trains gets the time to write a checkpoint."""


def return_error(function: Callable[[], T]) -> T | RunError:
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

    runs_per_device = 1
    is_remote = False

    def __init__(self, runs: int | None = 1) -> None:
        self.runs = runs

    def run(
        self, launches: Iterable[tuple[Path, Launch]], should_stop: Callable[[Path], bool] = lambda _: False
    ) -> Iterator[tuple[Path, WorkerResult]]:
        """Run recipes and give the result of each, by its file, when it ends.

        Args:
            launches: the file of each recipe and what starts it; the next is taken when it can start.
            should_stop: called again and again for each run that was started; True ends it.
        """
        # In the main thread, so that Ctrl-C reaches the run by launch_worker alone.
        for file, launch in launches:
            yield file, launch(should_stop=partial(should_stop, file))

    def call_all(self, functions: Sequence[Callable[[], T]]) -> Iterator[T | RunError]:
        """Call functions that use this executor, at the same time where it may; give what each returns or raises."""
        for function in functions:
            yield return_error(function)

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


class ParallelExecutor(Executor, ABC):
    """Several runs at the same time."""

    def __init__(self, runs: int | None) -> None:
        super().__init__(runs)
        self.unfinished: dict[Path, Task] = {}
        self.cancelled = False

    @abstractmethod
    def submit(self, recipe_file: Path, launch: Launch) -> Task:
        """Start a run, or have it start later, and return at once."""

    def run(
        self, launches: Iterable[tuple[Path, Launch]], should_stop: Callable[[Path], bool] = lambda _: False
    ) -> Iterator[tuple[Path, WorkerResult]]:
        waiting, tasks, stopped = iter(launches), dict[Path, Task](), set[Path]()
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
        futures = [threads.submit(copy_context().run, return_error, function) for function in functions]
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
    cancelled: Event

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> WorkerResult:
        return self.future.result()

    def cancel(self) -> None:
        self.cancelled.set()


class LocalExecutor(ParallelExecutor):
    """N runs at a time on this machine: each on its share of the cores, and the GPUs in turn."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        from torch.cuda import device_count

        self.threads = ThreadPoolExecutor(runs)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = visible.split(",") if visible else [str(i) for i in range(device_count())]
        self.runs_per_device = math.ceil(runs / max(1, len(self.gpus)))
        self.environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        # More threads than cores would wait for one another at the end of each product.
        cores = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // runs)))}
        for i in range(runs):
            gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[i % len(self.gpus)]} if self.gpus else {}
            self.environments.put({**cores, **gpu})

    def submit(self, recipe_file: Path, launch: Launch) -> Task:
        cancelled = Event()

        def raise_if_cancelled() -> bool:
            if cancelled.is_set():
                raise KeyboardInterrupt  # the run gets the time to write a checkpoint
            return False

        def run() -> WorkerResult:
            raise_if_cancelled()
            environment = self.environments.get()
            try:
                return launch_again_if_killed(launch, environment=environment, should_stop=raise_if_cancelled)
            finally:
                self.environments.put(environment)

        return LocalTask(self.threads.submit(run), cancelled)

    def close(self) -> None:
        self.threads.shutdown(wait=False)


@dataclass
class RayTask:
    """A task of Ray Core."""

    ray: Any
    reference: Any

    def done(self) -> bool:
        try:
            return bool(self.ray.wait([self.reference], timeout=0)[0])
        except (ConnectionError, self.ray.exceptions.RaySystemError) as e:
            hint = "once Ray runs again, the same command continues"
            raise RunError(f"the connection to Ray is lost: {' '.join(str(e).split())}", hint=hint) from None

    def result(self) -> WorkerResult:
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as e:
            return WorkerResult(f"Ray: {' '.join(str(e).split())}", False, 0.0)

    def cancel(self) -> None:
        with suppress(ConnectionError, self.ray.exceptions.RayError):
            self.ray.cancel(self.reference)  # raises KeyboardInterrupt in the task


class RayExecutor(ParallelExecutor):
    """Tasks on a Ray cluster: the one that `address` or RAY_ADDRESS names, one of this machine, or a new one here.

    A task whose machine or process dies is done again by Ray.
    """

    is_remote = True

    def __init__(self, place: Place) -> None:
        super().__init__(place.runs)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a cluster that is lost must not be replaced by a new one
        import ray

        self.ray = ray
        how: dict[str, Any] = {} if place.address else {"include_dashboard": False, "log_to_driver": False}
        try:
            ray.init(address=place.address, logging_level=logging.WARNING, **how)
        except (ConnectionError, RuntimeError, ValueError) as e:
            message = f"--on {place.text}: no connection to Ray: {' '.join(str(e).split())}"
            expected = "the address of a cluster that runs, with the same version of Ray"
            hint = "if the cluster asks for a token, set RAY_AUTH_MODE=token and give Ray the token"
            raise RunError(message, expected, hint) from None
        given = {name: float(value) for name, value in place.parameters.items()}
        # A run takes one GPU where there are some, else Ray would hide them from it.
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        resources: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": gpus, **given}
        self.launch: Any = ray.remote(max_retries=RESTARTS, **resources)(launch_again_if_killed)
        self.environment = {name: value for name in CARRIED if (value := os.environ.get(name))}
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, int(resources["num_cpus"]))))

    def submit(self, recipe_file: Path, launch: Launch) -> Task:
        return RayTask(self.ray, self.launch.remote(launch, environment=self.environment))

    def close(self) -> None:
        self.ray.shutdown()


@dataclass
class SlurmTask:
    """A job of submitit."""

    job: Any
    job_file: Path

    def done(self) -> bool:
        return self.job.done()

    def result(self) -> WorkerResult:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        self.job_file.unlink(missing_ok=True)
        try:
            return self.job.result()
        except (FailedJobError, UncompletedJobError) as e:
            why = " ".join(str(e).split())
            return WorkerResult(f"job {self.job.job_id}: {why}", False, 0.0)

    def cancel(self) -> None:
        self.job.cancel()
        self.job_file.unlink(missing_ok=True)


class SlurmJob:
    """What a job runs; submitit submits it again if Slurm preempts the job or its time is over."""

    def __call__(self, launch: Launch) -> WorkerResult:
        """Run the recipe; a run that was begun continues from its checkpoint."""
        return launch_again_if_killed(launch)

    def checkpoint(self, launch: Launch) -> Any:
        """Return what submitit submits again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, launch)


class SlurmExecutor(ParallelExecutor):
    """Jobs on Slurm, by submitit. They outlive this process: the same command finds them by `cells/lora-42.job`."""

    is_remote = True
    cluster = "slurm"

    def __init__(self, place: Place, folder: Path) -> None:
        super().__init__(place.runs)
        import submitit

        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UsageError(f"--on {place.text}: there is no srun here", "a machine that can submit Slurm jobs")
        self.job_class = submitit.SlurmJob if self.cluster == "slurm" else submitit.LocalJob
        self.folder = (folder / "slurm").absolute()
        self.executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        parameters = {f"slurm_{n}": int(v) if v.isdecimal() else v for n, v in place.parameters.items() if n != "time"}
        try:
            self.executor.update_parameters(timeout_min=int(place.parameters["time"]), name="slimtune", **parameters)
        except (NameError, ValueError, AssertionError) as e:
            raise UsageError(f"--on {place.text}: {' '.join(str(e).split())}", "parameters of submitit") from None

    def submit(self, recipe_file: Path, launch: Launch) -> Task:
        job_file = recipe_file.with_suffix(".job")
        if job_file.is_file():  # of a process that died: its job may still wait or run
            job: Any = self.job_class(self.folder, str(read_json(job_file)["job"]))
            if not job.done(force_check=True):
                return SlurmTask(job, job_file)
        job = self.executor.submit(SlurmJob(), launch)
        write_json(job_file, {"job": job.job_id})
        return SlurmTask(job, job_file)


def open_executor(place: Place | None, folder: Path) -> Executor:
    """Return the executor that `--on` asks for; None: one run after another.

    Args:
        place: what `--on` says.
        folder: of the comparison or the search, which every machine must see under this path.
    """
    if place is None:
        return Executor()
    if place.kind == "local":
        return LocalExecutor(place.runs or 1)
    return RayExecutor(place) if place.kind == "ray" else SlurmExecutor(place, folder)
