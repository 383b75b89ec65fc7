"""Tensors kept for the backward pass in the machine's memory instead of the device's.

    forward    1 → host   2 → host   3 → host          copied while the next layer is computed
    backward   3 ← host   2 ← host   1 ← host          each fetched while the one after it is used

They come back in the order opposite to that in which they went, so at each moment one is on its way ahead. On CUDA
copies run on a stream of their own, into pinned memory; elsewhere they are plain copies, and save nothing on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.simulated_device import host_allocation

LEAST = 1 << 16
"""Bytes below which a tensor stays where it is."""


@dataclass(eq=False)
class Away:
    """One tensor that went: its copy on the host, and the one that is on its way back, or there."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None


class ActivationOffload:
    """Sends what autograd keeps to the host, and fetches it back."""

    def __init__(self) -> None:
        # Weak: a graph that is dropped halfway takes its own with it.
        self._away: list[weakref.ref[Away]] = []
        self._first = False
        self._leaving: tuple[Tensor, Any] | None = None
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Send away the first tensor that is kept for the backward pass in the `with`, if it has `LEAST` bytes."""
        self._first = True
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | Away:
        first, self._first = self._first, False
        if not first or tensor.nbytes < LEAST:
            return tensor
        self._let_go()
        with host_allocation():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        away, values = Away(host, tensor.device), tensor.detach()
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                host.copy_(values, non_blocking=True)
                self._leaving = values, stream.record_event()
        else:
            host.copy_(values)
        self._away.append(weakref.ref(away))
        return away

    def _unpack(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._let_go()
        self._fetch(kept)
        back, kept.back = kept.back, None
        assert back is not None
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
        # The one that went before it is wanted next.
        while self._away and self._away.pop()() is not kept:
            pass
        while self._away and (before := self._away[-1]()) is None:
            self._away.pop()
        if self._away and before is not None:
            self._fetch(before)
        return back

    def _fetch(self, away: Away) -> None:
        """Begin to bring one back, unless that was begun."""
        if away.back is not None:
            return
        away.back = torch.empty(away.host.shape, dtype=away.host.dtype, device=away.device)
        if away.device.type != "cuda":
            away.back.copy_(away.host)
            return
        stream = self._stream(away.device)
        stream.wait_stream(torch.cuda.current_stream(away.device))  # where the memory was in use
        with torch.cuda.stream(stream):
            away.back.copy_(away.host, non_blocking=True)
            away.arrived = stream.record_event()
        away.back.record_stream(stream)

    def _let_go(self) -> None:
        """Let go of the last tensor that went; the device goes on when its copy is whole."""
        if self._leaving is not None:
            tensor, done = self._leaving
            torch.cuda.current_stream(tensor.device).wait_event(done)
            self._leaving = None

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
