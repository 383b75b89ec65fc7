"""Executors on clusters: Ray, and Slurm by submitit. They decide when and where a run starts."""

import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.foundation.cpu import CPU_SETTINGS
from ..core.foundation.files import read_json_object, write_json
from ..errors import RunError, UsageError, suggest
from .executors import ExecutorSpec, ParallelExecutorBase, SubmittedRun
from .run_worker import RESTARTS, Launch, WorkerResult, run_worker_with_restarts_if_killed

RAY_PARAMETERS = ("num_cpus", "num_gpus")
CARRIED = (
    "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "SLIMTUNE_TRACES",
    *CPU_SETTINGS,
)  # fmt: skip
"""Variables that a run on Ray gets from this process; Slurm passes the whole environment."""


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


class RayExecutor(ParallelExecutorBase):
    """Tasks on a Ray cluster: the one that the address or RAY_ADDRESS names, one of this machine, or a new one here.

    A task whose machine or process dies is done again by Ray.
    """

    package = "ray"
    is_remote = takes_address = True

    def __init__(self, spec: ExecutorSpec, folder: Path) -> None:
        super().__init__(spec, folder)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a cluster that is lost must not be replaced by a new one
        import ray

        self.ray = ray
        how: dict[str, Any] = {} if spec.address else {"include_dashboard": False, "log_to_driver": False}
        try:
            ray.init(address=spec.address, logging_level=logging.WARNING, **how)
        except (ConnectionError, RuntimeError, ValueError) as e:
            message = f"--on {spec.text}: no connection to Ray: {' '.join(str(e).split())}"
            expected = "the address of a cluster that runs, with the same version of Ray"
            hint = "if the cluster asks for a token, set RAY_AUTH_MODE=token and give Ray the token"
            raise RunError(message, expected, hint) from None
        given = {name: float(value) for name, value in spec.parameters.items()}
        # A run takes one GPU where there are some, else Ray would hide them from it.
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        resources: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": gpus, **given}
        self.launch: Any = ray.remote(max_retries=RESTARTS, **resources)(run_worker_with_restarts_if_killed)
        self.environment = {name: value for name in CARRIED if (value := os.environ.get(name))}
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, int(resources["num_cpus"]))))

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        for name, value in spec.parameters.items():
            if name not in RAY_PARAMETERS:
                raise UsageError(f"--on {spec.text}: no such parameter: {name}{suggest(name, RAY_PARAMETERS)}")
            if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", value):
                raise UsageError(f"--on {spec.text}: {name} is {value}", "a number, as 1 or 0.5")

    def submit(self, recipe_file: Path, launch: Launch) -> SubmittedRun:
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


class RequeueableSlurmRun:
    """What a job runs; submitit submits it again if Slurm preempts the job or its time is over."""

    def __call__(self, launch: Launch) -> WorkerResult:
        """Run the recipe; a run that was begun continues from its checkpoint."""
        return run_worker_with_restarts_if_killed(launch)

    def checkpoint(self, launch: Launch) -> Any:
        """Return what submitit submits again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, launch)


class SlurmExecutor(ParallelExecutorBase):
    """Jobs on Slurm, by submitit. They outlive this process: the same command finds them by `cells/lora-42.job`."""

    package = "submitit"
    is_remote = True
    cluster = "slurm"

    def __init__(self, spec: ExecutorSpec, folder: Path) -> None:
        super().__init__(spec, (folder / "slurm").absolute())
        import submitit

        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UsageError(f"--on {spec.text}: there is no srun here", "a machine that can submit Slurm jobs")
        self.job_class = submitit.SlurmJob if self.cluster == "slurm" else submitit.LocalJob
        self.executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        parameters = {f"slurm_{n}": int(v) if v.isdecimal() else v for n, v in spec.parameters.items() if n != "time"}
        try:
            self.executor.update_parameters(timeout_min=int(spec.parameters["time"]), name="slimtune", **parameters)
        except (NameError, ValueError, AssertionError) as e:
            raise UsageError(f"--on {spec.text}: {' '.join(str(e).split())}", "parameters of submitit") from None

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        if not re.fullmatch("[1-9][0-9]{0,5}", spec.parameters.get("time", "")):
            expected = "the minutes after which Slurm may end a run, as slurm:partition=gpu,time=240"
            raise UsageError(f"--on {spec.text} lacks time", expected, "submitit's own default is 5 minutes")

    def submit(self, recipe_file: Path, launch: Launch) -> SubmittedRun:
        job_file = recipe_file.with_suffix(".job")
        if job_file.is_file():  # of a process that died: its job may still wait or run
            job: Any = self.job_class(self.folder, str(read_json_object(job_file)["job"]))
            if not job.done(force_check=True):
                return SlurmTask(job, job_file)
        job = self.executor.submit(RequeueableSlurmRun(), launch)
        write_json(job_file, {"job": job.job_id})
        return SlurmTask(job, job_file)
