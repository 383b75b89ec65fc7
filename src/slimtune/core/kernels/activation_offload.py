"""Keep tensors saved for the backward pass in CPU memory instead of on the GPU.

    forward    1 → CPU   2 → CPU   3 → CPU          copied while the next layer is computed
    backward   3 ← CPU   2 ← CPU   1 ← CPU          each fetched while the one after it is used

Tensors come back in reverse order, so one is always prefetched. On CUDA, copies run on their own stream to pinned
memory. On other devices they are plain copies; on a CPU they save nothing.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..foundation.device import counting_allocations_as_host

MIN_BYTES = 1 << 16
"""Smaller tensors stay where they are."""


@dataclass(eq=False)
class _OffloadedTensor:
    """One offloaded tensor."""

    host: Tensor  # its copy in CPU memory
    device: torch.device
    fetched: Tensor | None = None  # the copy on its way back, or back already
    arrived: Any = None  # CUDA event after which `fetched` is complete


class ActivationOffload:
    """Copies what autograd saves to CPU memory, and back."""

    def __init__(self) -> None:
        # Weak references: an autograd graph that is dropped halfway frees its own tensors.
        self._offloaded: list[weakref.ref[_OffloadedTensor]] = []
        self._is_first = False
        self._copying: tuple[Tensor, Any] | None = None

    @contextmanager
    def offload_first(self) -> Iterator[None]:
        """Offload the first tensor that is saved for the backward pass inside the `with`, from `MIN_BYTES` on."""
        self._is_first = True
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _OffloadedTensor:
        first, self._is_first = self._is_first, False
        if not first or tensor.nbytes < MIN_BYTES:
            return tensor
        self._release_source()
        with counting_allocations_as_host():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        offloaded, values = _OffloadedTensor(host, tensor.device), tensor.detach()
        if tensor.is_cuda:
            stream = _copy_stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                host.copy_(values, non_blocking=True)
                self._copying = values, stream.record_event()
        else:
            host.copy_(values)
        self._offloaded.append(weakref.ref(offloaded))
        return offloaded

    def _unpack(self, saved: Tensor | _OffloadedTensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._release_source()
        self._fetch(saved)
        tensor, saved.fetched = saved.fetched, None
        assert tensor is not None
        if saved.arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.arrived)
        # Prefetch the one offloaded before this one, which is needed next.
        while self._offloaded and self._offloaded.pop()() is not saved:
            pass
        while self._offloaded and (previous := self._offloaded[-1]()) is None:
            self._offloaded.pop()
        if self._offloaded and previous is not None:
            self._fetch(previous)
        return tensor

    def _fetch(self, offloaded: _OffloadedTensor) -> None:
        """Start to copy a tensor back, unless that has started."""
        if offloaded.fetched is not None:
            return
        tensor = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=offloaded.device)
        offloaded.fetched = tensor
        if offloaded.device.type != "cuda":
            tensor.copy_(offloaded.host)
            return
        stream = _copy_stream(offloaded.device)
        stream.wait_stream(torch.cuda.current_stream(offloaded.device))  # the memory may still be in use there
        with torch.cuda.stream(stream):
            tensor.copy_(offloaded.host, non_blocking=True)
            offloaded.arrived = stream.record_event()
        tensor.record_stream(stream)

    def _release_source(self) -> None:
        """Free the last offloaded tensor on the device; the device waits for its copy to finish."""
        if self._copying is not None:
            tensor, done = self._copying
            torch.cuda.current_stream(tensor.device).wait_event(done)
            self._copying = None


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
