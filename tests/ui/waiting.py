"""Waiting for what another process says."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(done: Callable[[], Any], what: str = "it") -> Any:
    """Return what `done` returns as soon as that is true."""
    for _ in range(400):
        if found := done():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} has not come in 20 seconds")
