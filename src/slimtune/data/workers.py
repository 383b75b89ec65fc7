"""Work on batches over all cores: results in the order of the batches, few of either in memory.

The first batches are done here, so a small file starts no process. A process that is started imports what the work
needs and gets the work once; an exception there is raised here as it was.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, TypeVar

from ..errors import RunError

T = TypeVar("T")
R = TypeVar("R")
ALONE = 16
"""Batches that are done before a process is started."""
_work: Callable[[Any], Any]


def cpu_count() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[T], R], batches: Iterable[T], processes: int = 1, *, alone: int | None = None
) -> Iterator[R]:
    """Yield `work(batch)` for each batch, in order.

    Args:
        work: a callable that can be sent to another process.
        batches: read as they are needed.
        processes: how many work at once; 1: this one alone.
        alone: batches that are done here first; None: `ALONE`.

    Raises:
        RunError: a process died.
        what `work` raises.
    """
    waiting = iter(batches)
    for batch in itertools.islice(waiting, ALONE if alone is None else alone) if processes > 1 else waiting:
        yield work(batch)
    for batch in waiting:  # there are more
        yield from _shared(work, itertools.chain([batch], waiting), processes)


def _shared(work: Callable[[T], R], batches: Iterable[T], processes: int) -> Iterator[R]:
    # A forked process would hold locks of threads that it does not have.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, _begin, (work,))
    running: deque[Future[R]] = deque()
    try:
        for batch in batches:
            running.append(pool.submit(_do, batch))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that encodes rows ended before its work was done",
            "processes that can be started, and memory for them",
            "in a script of your own, put what it runs under `if __name__ == '__main__':`",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that asked ends the others
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with the one that asked for it: where that is killed, the queue between them never ends."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _do(batch: Any) -> Any:
    return _work(batch)
