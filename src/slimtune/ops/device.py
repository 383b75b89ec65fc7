"""Which kind of device code runs for: where its tensors lie, or the one that a plan pretends they lie on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_acted: ContextVar[str | None] = ContextVar("acted", default=None)


@contextmanager
def acting_as(kind: str) -> Iterator[None]:
    """Choose kernels and chunks as on a device of this kind ("cpu", "cuda", "mps"), whatever lies where."""
    before = _acted.set(kind)
    try:
        yield
    finally:
        _acted.reset(before)


def kind_of_device(device: torch.device) -> str:
    """Return the kind of a device, or the one that is acted."""
    return _acted.get() or device.type


def is_acted() -> bool:
    """Return whether the device is pretended: then nothing is computed, and tensors have shapes alone."""
    return _acted.get() is not None
