"""The processes of one run, started by torchrun or `accelerate launch`: their ranks and what they exchange.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; without them there is one process and every function
here returns at once. All processes do the same in the same order; only the main process writes files and prints. Small
values (numbers, a plan, an error) go over gloo, gradients over NCCL if they are on GPUs. When a process dies, the
others notice within `TIMEOUT` and exit, and one of them prints why.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import RunError, SlimtuneError, UsageError

T = TypeVar("T")
P = ParamSpec("P")
TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one: longer than any micro-batch, checkpoint or plan takes."""
SIGTERM_GRACE_SECONDS = 25
"""How long a process that got SIGTERM tries to end its step and write a checkpoint; torchrun kills it after 30."""
PRINTED_KEY, PEER_GONE_KEY = "slimtune/printed", "slimtune/peer-gone"
_groups_created = 0
_resume_command = "the same command with --resume"


class PeerGone(RunError):
    """Another process of the run ended too early."""


# --- who this process is ----------------------------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return this process's number in the run, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return rank() == 0


def local_world_size() -> int:
    """Return how many processes of the run share this machine and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def local_rank() -> int:
    """Return this process's number on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def create_process_group_if_needed() -> bool:
    """Create the process group; return whether this call did it.

    Raises UsageError if accelerate is configured to do what the recipe sets, PeerGone if not all processes came.
    """
    global _groups_created
    if world_size() == 1 or dist.is_initialized():
        return False
    for name in ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION"):
        if (value := os.environ.get(f"ACCELERATE_{name}", "no").lower()) not in ("", "no", "0", "false"):
            raise UsageError(
                f"accelerate's configuration sets {name.lower()} to {value}, which slimtune train does not read",
                "train.fsdp and model.dtype in the recipe",
                "accelerate launch --multi_gpu (or --cpu) --mixed_precision no, or torchrun",
            )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        # A second run in these processes must not read the addresses of the first one's group.
        store = dist.PrefixStore(f"slimtune/{_groups_created}", _store())
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    except (RuntimeError, dist.DistError) as e:
        message = f"not all of {world_size()} processes came: {_first_sentence(e)}"
        raise PeerGone(message, "all of them, started together") from e
    _groups_created += 1
    return True


def wait_and_destroy_process_group() -> None:
    """Wait for all processes and destroy the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# --- what the processes exchange --------------------------------------------------------------------------------------


def runs_on_main_and_broadcasts(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that the main process runs alone.

    Every process gets what it returns (by pickle), or raises what it raised.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if world_size() == 1:
            return function(*args, **kwargs)
        outcome: list[Any] = [None, None]
        if is_main_process():
            try:
                outcome[0] = function(*args, **kwargs)
            except SlimtuneError as e:
                outcome[1] = e
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    return run


def raises_on_all_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that fails in all processes if it fails in one, as `run_on_all_ranks` does."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_on_all_ranks(lambda: function(*args, **kwargs))

    return run


def run_on_all_ranks(function: Callable[[], T], *, in_turns: bool = False) -> T:
    """Run `function`, which must not communicate, in every process; if it fails in one, raise in all.

    A process raises its own error, or else that of the first process that has one. With `in_turns` the processes of a
    machine run it one after another, because it takes much CPU memory.
    """
    if world_size() == 1:
        return function()
    result, error = None, None
    for turn in range(local_world_size() if in_turns else 1):
        if not in_turns or turn == local_rank():
            try:
                result = function()
            except SlimtuneError as e:
                error = e
        if in_turns:
            dist.barrier()
    errors = all_gather_object(error)
    if error is not None:
        raise error
    for number, other in enumerate(errors):
        if other is not None:
            raise type(other)(f"process {number} of {world_size()}: {other.message}", other.expected, other.hint)
    return result  # type: ignore[return-value]


def all_gather_object(value: T) -> list[T]:
    """Return every process's value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    if world_size() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def any_process_true(value: bool) -> bool:
    """Return whether a value is true in any process."""
    return all_reduce_sum([float(value)])[0] > 0


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by the sum over all processes, bit for bit the same everywhere.

    One exchange per dtype. A parameter without a gradient in any process stays without one: an optimizer treats that
    differently from a gradient of zero.
    """
    trained = list(parameters)
    for dtype in dict.fromkeys(p.dtype for p in trained):
        group = [p for p in trained if p.dtype == dtype]
        has_gradient = group[0].new_tensor([float(p.grad is not None) for p in group])
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group]
        flat = torch.cat([has_gradient, *gradients])
        dist.all_reduce(flat)
        counts = flat[: len(group)].tolist() if any(p.grad is None for p in group) else [1.0] * len(group)
        sums = flat[len(group) :].split([p.numel() for p in group])
        for parameter, gradient, count in zip(group, sums, counts, strict=True):
            if count:
                parameter.grad = gradient.view_as(parameter)


# --- when a process ends too early ------------------------------------------------------------------------------------


@contextmanager
def translate_communication_errors() -> Iterator[None]:
    """Raise `PeerGone` in place of a communication error inside the block."""
    try:
        yield
    except (RuntimeError, dist.DistError) as e:
        words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "socket", "recv", "peer")
        communication = isinstance(e, dist.DistError) or any(w in str(e).lower() for w in words)
        if world_size() > 1 and communication and not isinstance(e, torch.OutOfMemoryError):
            raise _peer_gone(_first_sentence(e)) from e
        raise


def exit_on_sigterm_with_resume_hint(resume_command: str) -> None:
    """Print why, and how to resume, and exit on SIGTERM, which torchrun sends when another process has died.

    A thread waits for the signal, because a process that waits for another one inside NCCL runs no Python. A process
    that handles SIGTERM itself, as the training loop does, first gets time to end its step: a scheduler sends SIGTERM
    to all processes, and then none is lost.
    """
    global _resume_command
    _resume_command = resume_command
    if world_size() == 1 or threading.current_thread() is not threading.main_thread():
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def ignore(*_: Any) -> None:  # Python passes signals to the pipe only if it handles them
        pass

    signal.signal(signal.SIGTERM, ignore)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def wait_for_sigterm() -> None:
        while (received := os.read(read_end, 1)) and received[0] != signal.SIGTERM:
            pass
        reason = "this process got SIGTERM"
        if signal.getsignal(signal.SIGTERM) is not ignore:
            time.sleep(SIGTERM_GRACE_SECONDS)
            reason += f", and its step did not end within {SIGTERM_GRACE_SECONDS} seconds"
        error = _peer_gone(reason)
        if wait_to_claim_printing_new_error(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the main thread may be printing its own message
        os._exit(1)

    threading.Thread(target=wait_for_sigterm, daemon=True).start()


def wait_to_claim_printing_new_error(error: SlimtuneError) -> bool:
    """Return whether this process prints an error; if so, tell the others.

    The main process prints its own errors. Another process waits for that and prints its error if it is a different
    one. A lost process is reported once, by the first one to notice, unless an error that explains it was printed.
    """
    if world_size() == 1:
        return True
    peer_gone = isinstance(error, PeerGone)
    try:
        store = _store()
        if peer_gone or not is_main_process():
            end = time.monotonic() + (2 if peer_gone else 10)
            while not (found := store.check([PRINTED_KEY])) and time.monotonic() < end:
                time.sleep(0.05)
            if found and (peer_gone or store.get(PRINTED_KEY).decode() == str(error)):
                return False
            if peer_gone and store.add(PEER_GONE_KEY, 1) > 1:
                return False
        store.set(PRINTED_KEY, str(error))
    except (RuntimeError, dist.DistError):
        return True  # the process with the store is gone
    return True


def _peer_gone(reason: str) -> PeerGone:
    return PeerGone(
        f"another process of this run has ended, and with it the run ({reason})",
        f"all {world_size()} processes to the end",
        "read its message, if it printed one, then resume from the last checkpoint with any number of processes: "
        + _resume_command,
    )


@cache
def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return store


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error, without the location in PyTorch's sources."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0][:200]
