"""Which kind of device code runs for: where its tensors lie, or the one that a plan pretends they lie on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_acted: ContextVar[str | None] = ContextVar("acted", default=None)
_host: ContextVar[bool] = ContextVar("host", default=False)


@contextmanager
def simulate_device(kind: str) -> Iterator[None]:
    """Choose kernels and chunks as on a device of this kind ("cpu", "cuda", "mps"), whatever lies where."""
    before = _acted.set(kind)
    try:
        yield
    finally:
        _acted.reset(before)


def device_type(device: torch.device) -> str:
    """Return the kind of a device, or the one that is acted."""
    return _acted.get() or device.type


def is_simulated() -> bool:
    """Return whether the device is pretended: then nothing is computed, and tensors have shapes alone."""
    return _acted.get() is not None


@contextmanager
def host_allocation() -> Iterator[None]:
    """Mark what is allocated in the `with` as the machine's own memory: a plan pretends that devices are a CPU."""
    before = _host.set(True)
    try:
        yield
    finally:
        _host.reset(before)


def is_host_allocation() -> bool:
    """Return whether what is allocated now is marked as the machine's own memory."""
    return _host.get()
