"""An ordered parallel map over batches, with few batches in memory.

`datasets.map(num_proc=…)` is not used: it needs a copy of the input on disk, which every process maps into memory, it
forks a process that has threads, and it reports an invalid row only after the whole file.
"""

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

from ...errors import RunError

T = TypeVar("T")
R = TypeVar("R")
SERIAL_BATCHES = 16
"""Batches that this process maps before it starts others, so that a small file starts none."""
_function: Callable[[Any], Any]


def parallel_map(function: Callable[[T], R], batches: Iterable[T], processes: int = 1) -> Iterator[R]:
    """Yield `function(batch)` for each batch, in order; batches are read only as they are needed.

    `function` must be picklable: every process imports its module and receives it once. Its errors are raised here;
    RunError means that a process died.
    """
    left = iter(batches)
    yield from map(function, itertools.islice(left, SERIAL_BATCHES if processes > 1 else None))
    if (first := next(left, None)) is None:
        return
    # Not fork: a forked process would have the locks of threads that it does not have.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (function,))
    running: deque[Future[R]] = deque()
    try:
        for batch in itertools.chain([first], left):
            running.append(pool.submit(_call, batch))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        hint = "in a script of your own, put its code under `if __name__ == '__main__':`"
        expected = "processes that can be started, and memory for them"
        raise RunError("a process that tokenizes rows died", expected, hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    exit_with_parent()


def exit_with_parent() -> None:
    """Let this process exit when its parent is killed; without this a worker waits for its queue forever."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _call(batch: Any) -> Any:
    return _function(batch)
