"""What `--on` says: where several runs train at the same time."""

import re
from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError, format_install_command, suggest
from .clusters import RayExecutor, SlurmExecutor
from .executors import Executor, ExecutorSpec, LocalParallelExecutor, ParallelExecutorBase

EXECUTORS: dict[str, type[ParallelExecutorBase]] = {
    "local": LocalParallelExecutor,
    "ray": RayExecutor,
    "slurm": SlurmExecutor,
}
PLACES = "local:4, ray, ray://HOST:PORT, or slurm:partition=NAME,time=MINUTES"


def parse_executor_spec(text: str) -> ExecutorSpec:
    """Parse `local:4`, `ray`, `ray:4,num_gpus=1`, `ray://host:10001` or `slurm:4,partition=gpu,time=60`.

    Raises:
        UsageError: it has another form, or the package that it needs is not installed.
    """
    kind, _, rest = text.partition(":")
    if kind not in EXECUTORS:
        raise UsageError(f"--on {text}: no such place{suggest(kind, EXECUTORS)}", PLACES)
    executor = EXECUTORS[kind]
    address, runs, parameters = None, None, {}
    for item in filter(None, (item.strip() for item in rest.split(","))):
        name, is_set, value = item.partition("=")
        if is_set and value and executor.takes_parameters:
            parameters[name] = value
        elif re.fullmatch("[1-9][0-9]{0,3}", item) and runs is None:
            runs = int(item)
        elif item.startswith("//") and executor.takes_address and address is None:
            address = f"{kind}:{item}"
        else:
            raise UsageError(f"--on {text}: {item} is not understood", PLACES)
    place = ExecutorSpec(text, kind, runs, address, parameters)
    executor.check(place)
    if executor.package is not None and find_spec(executor.package) is None:
        raise UsageError(f"--on {text} needs {executor.package}, not installed here", hint=format_install_command(kind))
    return place


def make_executor(spec: ExecutorSpec | None, folder: Path) -> Executor:
    """Return the executor that `--on` asks for; None: one run after another. Arguments: see `ParallelExecutorBase`."""
    return Executor() if spec is None else EXECUTORS[spec.kind](spec, folder)
