"""Waiting for what another process, or another thread, does."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(done: Callable[[], Any], what: str = "it", seconds: float = 20) -> Any:
    """Return what `done` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what} has not come in {seconds:g} seconds")
