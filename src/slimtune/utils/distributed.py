"""The processes of one run, started together by torchrun or `accelerate launch`: who they are, what they agree on.

    torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE; without them there is one process, which talks to none

Every process does the same in the same order; the first one alone writes files and speaks. What they exchange is small
(numbers, a plan, an error) and goes over gloo; gradients go over NCCL where they lie on GPUs. A process that ends takes
the others with it: each notices within `PATIENCE`, one of them says so.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..errors import RunError, SlimtuneError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one: longer than any pass, checkpoint or plan takes, short of an evening."""
_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
_TOLD, _GONE = "slimtune/told", "slimtune/gone"
_joined = 0
_on = ["go on with --resume"]


class PeerGone(RunError):
    """Another process of the run ended before its time."""


@dataclass(frozen=True)
class _Launched:
    world_size: int
    rank: int
    local_world_size: int
    local: int


@cache
def _launched() -> _Launched:
    n = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if n == 1:
        return _Launched(1, 0, 1, 0)
    beside, local = (int(os.environ.get(name, other)) for name, other in (("LOCAL_WORLD_SIZE", n), ("LOCAL_RANK", 0)))
    return _Launched(n, int(os.environ["RANK"]), beside, local)


def world_size() -> int:
    """Return how many processes this run has."""
    return _launched().world_size


def rank() -> int:
    """Return this process's number, from 0."""
    return _launched().rank


def is_main_process() -> bool:
    """Return whether this is the process that writes and speaks."""
    return rank() == 0


def local_world_size() -> int:
    """Return how many processes of the run share this machine and its memory."""
    return _launched().local_world_size


def init_distributed() -> bool:
    """Meet the other processes; return whether this call did so. Alone, or met already, nothing happens.

    Raises:
        UsageError: accelerate was told to do what the recipe says, or does not know.
        PeerGone: they did not come.
    """
    global _joined
    if world_size() == 1 or dist.is_initialized():
        return False
    _refuse_settings_of_accelerate()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store = dist.PrefixStore(f"slimtune/{_joined}", _store())
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    except (RuntimeError, dist.DistError) as e:
        raise PeerGone(f"not all of {world_size()} processes came: {_line(e)}", "all of them, started together") from e
    _joined += 1
    return True


def shutdown() -> None:
    """Part from the others, when all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def local_device() -> str:
    """Return the device of this process where GPUs train: each process of a machine has its own.

    Raises:
        UsageError: there are fewer than processes.
    """
    mine = _launched().local
    if mine >= torch.cuda.device_count():
        raise UsageError(
            f"{local_world_size()} processes on a machine with {torch.cuda.device_count()} GPUs",
            "at most one process a GPU",
            f"--nproc-per-node {torch.cuda.device_count()}, or --set model.device=cpu",
        )
    return f"cuda:{mine}"


@contextmanager
def hide_launcher_env() -> Iterator[None]:
    """Let libraries made inside find no sign of a launcher, so that the Trainer works as if this process were alone."""
    _launched()  # what is seen here is kept
    hidden = {n: os.environ.pop(n) for n in list(os.environ) if n in _LAUNCHERS or n.startswith("ACCELERATE_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights are divided over the processes (FSDP2)."""
    return isinstance(model, FSDPModule)


def _refuse_settings_of_accelerate() -> None:
    said = {n: os.environ.get(f"ACCELERATE_{n}", "") for n in ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION")}
    for name, instead in (("USE_FSDP", "train.fsdp: true"), ("USE_DEEPSPEED", "train.fsdp: true")):
        if said[name].lower() in ("1", "true", "yes"):
            raise UsageError(
                f"accelerate's configuration sets {name.lower()}, which slimtune train does not read",
                f"{instead} in the recipe where the base is to be divided",
                "accelerate launch --multi_gpu (or --cpu), or torchrun",
            )
    if said["MIXED_PRECISION"].lower() not in ("", "no"):
        raise UsageError(
            f"accelerate's configuration sets mixed precision {said['MIXED_PRECISION']}",
            "model.dtype in the recipe: what is computed in",
            "accelerate launch --mixed_precision no",
        )


# --- what they tell each other ----------------------------------------------------------------------------------------


def run_on_main(work: Callable[[], T]) -> T:
    """Let the first process do it; every process gets what it returns, or raises what it raised.

    Args:
        work: returns plain values.
    """
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    if is_main_process():
        try:
            told[0] = work()
        except SlimtuneError as e:
            told[1] = e
    with translate_peer_errors():
        dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def run_on_all_ranks(work: Callable[[], T], *, in_turns: bool = False) -> T:
    """Do the same in every process, `work` without talking; where it fails in one, it fails in all.

    Args:
        work: what to do.
        in_turns: the processes of a machine do it one after another, since it takes much of the machine's memory.

    Raises:
        SlimtuneError: this process's own fault, or the fault of the first process that has one.
    """
    if world_size() == 1:
        return work()
    made, fault = None, None
    for turn in range(local_world_size() if in_turns else 1):
        if not in_turns or turn == _launched().local:
            try:
                made = work()
            except SlimtuneError as e:
                fault = e
        if in_turns:
            barrier()
    faults = all_gather_object(fault)
    if fault is not None:
        raise fault
    for number, other in enumerate(faults):
        if other is not None:
            raise type(other)(f"process {number} of {world_size()}: {other.message}", other.expected, other.hint)
    return made  # type: ignore[return-value]


def all_gather_object(value: T) -> list[T]:
    """Return every process's value, by number."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with translate_peer_errors():
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    if world_size() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    with translate_peer_errors():
        dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum of all processes' gradients in place of each one's own; bit for bit the same everywhere.

    One exchange a dtype. A parameter that no process has a gradient of keeps none.
    """
    trained = list(parameters)
    for dtype in dict.fromkeys(p.dtype for p in trained):
        mine = [p for p in trained if p.dtype == dtype]
        # How many have a gradient goes along: an optimizer treats none otherwise than zero.
        there = mine[0].new_tensor([float(p.grad is not None) for p in mine])
        flat = torch.cat([there, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in mine)])
        with translate_peer_errors():
            dist.all_reduce(flat)
        some = flat[: len(mine)].tolist() if any(p.grad is None for p in mine) else [1.0] * len(mine)
        parts = flat[len(mine) :].split([p.numel() for p in mine])
        for p, part, anywhere in zip(mine, parts, some, strict=True):
            if anywhere:
                p.grad = part.view_as(p)


def barrier() -> None:
    """Go on when every process is here."""
    if world_size() > 1:
        with translate_peer_errors():
            dist.barrier()


# --- when one of them ends --------------------------------------------------------------------------------------------


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Raise `PeerGone` for what fails inside because another process is gone."""
    try:
        yield
    except (RuntimeError, dist.DistError) as e:
        if world_size() > 1 and _of_talking(e):
            raise PeerGone(*_ended(_line(e))) from e
        raise


def _of_talking(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "socket", "recv", "peer")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


def _ended(why: str) -> tuple[str, str, str]:
    return (
        f"another process of this run has ended, and with it the run ({why})",
        f"all {world_size()} processes to the end",
        f"see what it said, if it could; the last checkpoint is whole: {_on[0]}, in as many processes as you like",
    )


def install_sigterm_watcher(go_on: str) -> None:
    """Say why, and end, when this process is told to (SIGTERM): so torchrun does where another one ended.

    A thread waits for it, since a process that waits for another one in NCCL runs no Python.

    Args:
        go_on: how to go on then, which is part of what is said.
    """
    _on[0] = go_on
    if world_size() == 1 or threading.current_thread() is not threading.main_thread():
        return
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # so that Python hands the signal on
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)

    def wait() -> None:
        while (heard := os.read(out, 1)) and heard[0] != signal.SIGTERM:
            pass
        end = PeerGone(*_ended("this process was told to end by SIGTERM"))
        if should_print_error(end):
            print(f"error: {end}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def should_print_error(error: SlimtuneError) -> bool:
    """Return whether this process is the one to say an error; then call `said` after.

    The first process says its own. Another one waits a little for that, and says its own if it is another. That a
    process is gone says whoever notices, once, if nothing was said that explains it.
    """
    if world_size() == 1 or (is_main_process() and not isinstance(error, PeerGone)):
        return True
    try:
        store = _store()
        if isinstance(error, PeerGone):
            return not _told(store, 2) and store.add(_GONE, 1) == 1
        return _told(store, 10) != str(error)
    except (RuntimeError, dist.DistError):
        return True  # whoever kept it is gone


def mark_error_printed(error: SlimtuneError) -> None:
    """Let the others know that an error was said."""
    if world_size() > 1:
        try:
            _store().set(_TOLD, str(error))
        except (RuntimeError, dist.DistError):
            return  # whoever kept it is gone: nobody is left to know


def _told(store: Any, seconds: float) -> str:
    """Return the error that was said, `""` if none was after some seconds."""
    end = time.monotonic() + seconds
    while not store.check([_TOLD]):
        if time.monotonic() > end:
            return ""
        time.sleep(0.05)
    return store.get(_TOLD).decode()


@cache
def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    return store


def _line(error: BaseException) -> str:
    """Return what an error says in its first sentence, without where in PyTorch's sources."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0][:200]
