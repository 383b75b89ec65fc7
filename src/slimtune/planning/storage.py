"""Counting what tensors take while code runs: bytes of live storages, real or fake, and the work done on them.

Every operator that torch runs passes here. A storage counts from the operator that made it until nothing holds it any
more, so views and what was changed in place cost nothing, and what autograd keeps counts as long as autograd keeps it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..utils.simulated_device import in_host_allocation

_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products in place, which torch's own registry does not count."""
STATE = ("weights", "adapters", "gradients", "optimizer")
PARTS = (*STATE, "activations", "logits")
HOST = "host"
_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
_ALONE = (4, 2)
"""References to a tensor that autograd hands to an operator, and to its storage, where nothing else holds it."""


class Storages(TorchDispatchMode):
    """Counts bytes while it is entered.

    Args:
        block: a storage takes a multiple of so many bytes: 512 on CUDA, 1 where the bytes asked for are meant.
        vocabulary: a tensor whose last dimension has this size counts as logits.
        events: keep every allocation (+) and release (−) in order, as `(storage, bytes)`.
        work: count the work done.
        host_apart: the device has memory of its own: what is marked as the machine's is counted for itself.
        known: asked first what an operator makes (`Fakes.recalled`), and NotImplemented where it does not know.
    """

    def __init__(
        self,
        block: int = 1,
        vocabulary: int = 0,
        events: bool = False,
        work: bool = True,
        known: Callable[[Any, tuple, dict[str, Any]], Any] = lambda *_: NotImplemented,
        host_apart: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.vocabulary, self.works, self.known = block, vocabulary, work, known
        self.host_apart = host_apart
        self.now: Counter[str] = Counter()
        self.total = 0
        self.host = self.host_peak = 0
        """Bytes marked as the machine's own memory (`ops.device.on_host`), and the most of them."""
        self.peaks: dict[str, int] = {}
        self.at_peaks: dict[str, dict[str, int]] = {}
        """For each phase the bytes by part at its highest point."""
        self.work: Counter[tuple[int, int, torch.dtype]] = Counter()
        """How often an operator with (floating point operations, bytes read and written, dtype) ran."""
        self.events: list[tuple[int, int]] | None = [] if events else None
        self._phase = "start"
        self._live: dict[int, tuple[int, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and to say so takes as long as an operator

    def phase(self, name: str) -> None:
        """Begin a phase; `peaks[name]` is the most bytes live in it."""
        self._phase = name
        self._mark()

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors, from now on, as `part` of the whole."""
        for tensor in tensors:
            self._count(tensor, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator and count what it made."""
        kwargs = kwargs or {}
        if func is _ADD and _sums_gradients(*args):
            func = _ADD_IN_PLACE  # as autograd does with real tensors, but not with fakes
        out = self.known(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        made = list(_tensors(out))
        for tensor in made:
            self._count(tensor)
        if self.works and made and not func.is_view:
            self._worked(func, args, kwargs, out)
        return out

    def _count(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            if part is not None:
                size, before = self._live[key]
                self.now[before] -= size
                self.now[part] += size
                self._live[key] = (size, part)
            return
        size = -(-storage.nbytes() // self.block) * self.block
        if self.host_apart and in_host_allocation():
            self._live[key] = (size, HOST)
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            weakref.finalize(storage, self._release, key).atexit = False
            return
        if part is None:
            is_logits = self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            part = "logits" if is_logits else "activations"
        self._live[key] = (size, part)
        self.now[part] += size
        self.total += size
        if self.events is not None:
            self.events.append((key, size))
        weakref.finalize(storage, self._release, key).atexit = False
        self._mark()

    def _release(self, key: int) -> None:
        size, part = self._live.pop(key)
        if part == HOST:
            self.host -= size
            return
        self.now[part] -= size
        self.total -= size
        if self.events is not None:
            self.events.append((key, -size))

    def _mark(self) -> None:
        if self.total > self.peaks.get(self._phase, 0):
            self.peaks[self._phase], self.at_peaks[self._phase] = self.total, dict(self.now)

    def _worked(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        packet = func._overloadpacket
        counted = flop_registry.get(_IN_PLACE.get(packet, packet))
        operations = counted(*args, **kwargs, out_val=out) if counted else 0
        moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
        self.work[operations, moved, next(_tensors(out)).dtype] += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _sums_gradients(so_far: Any, more: Any) -> bool:
    """Return whether autograd adds a gradient to a sum that only autograd holds."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    if not isinstance(more, Tensor) or so_far.shape != more.shape:
        return False
    return (so_far._use_count(), torch._C._storage_Use_Count(so_far.untyped_storage()._cdata)) == _ALONE
