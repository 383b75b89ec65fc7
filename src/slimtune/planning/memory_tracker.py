"""Count the bytes of live tensors, and the work done on them, while code runs on real or fake tensors.

`MemoryTracker` is a torch dispatch mode: while it is entered, PyTorch hands it every operator. It runs the operator and
looks at the storages of what came out. A storage counts from the operator that makes it until Python and autograd drop
the last reference to it, so views and in-place operators cost nothing, and what autograd saves for the backward pass
counts as long as it is saved.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe  # noqa: F401  (registers its operators)

from ..core.foundation.device import is_counting_allocations_as_host
from ..errors import ModelError

_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
_DEVICE = torch.ops.prim.device.default
_IN_PLACE_PRODUCTS = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""torch's FLOP registry has no entry for these."""
_FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 4, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 7, 5),
}
"""Kernels for which torch's FLOP registry has no entry: the places of the query and of `is_causal` among the arguments,
and the number of products of queries with keys, or of as many operations."""
_EXPERT_PRODUCTS = {
    torch.ops.aten._grouped_mm: 1,
    torch.ops.transformers.grouped_mm_fallback: 1,
    torch.ops.transformers.grouped_mm_fallback_backward: 2,
}
"""Products of tokens with a mixture's experts, and how many of them an operator computes."""


class MemoryTracker(TorchDispatchMode):
    """Counts bytes by part and by phase while it is entered.

    Args:
        block: a storage takes a multiple of this many bytes: 512 on CUDA, 1 on a CPU.
        vocab_size: tensors whose last dimension has this size count as "logits"; all others as "activations", unless
            `assign` says otherwise.
        count_operators: also count floating point operations and bytes moved.
        separate_host: the device has its own memory: what is allocated in `counting_allocations_as_host` counts apart.
        max_operators: raise ModelError when more have run.
        find_result: returns what an operator makes, or NotImplemented if it must run.

    Attributes:
        live: bytes by part now; part "host" is not on the device.
        phases: bytes by part at the highest point of each phase.
        host_peak: highest number of bytes in CPU memory; 0 unless `separate_host`.
        paused: operators run uncounted, and tensors that they make are not known.
        counts_by_operator_cost: how often an operator of (FLOPs, bytes read and written, dtype) ran.
        attention_flops_by_dtype: FLOPs of fused attention, by dtype; `counts_by_operator_cost` has them as 0.
    """

    def __init__(
        self,
        block: int = 1,
        vocab_size: int = 0,
        count_operators: bool = False,
        separate_host: bool = False,
        max_operators: float = float("inf"),
        find_result: Callable[[Any, tuple, dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.block, self.vocab_size = block, vocab_size
        self.count_operators, self.separate_host = count_operators, separate_host
        self.max_operators, self.find_result = max_operators, find_result
        self.live: Counter[str] = Counter()
        self.phases: dict[str, dict[str, int]] = {}
        self.host_peak = 0
        self.counts_by_operator_cost: Counter[tuple[int, int, torch.dtype]] = Counter()
        self.attention_flops_by_dtype: Counter[torch.dtype] = Counter()
        self.paused = False
        self._phase = "start"
        self._operators = 0
        self._total = 0  # on the device
        self._peaks: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # by default torch guards each call against its compiler, which takes as long as an operator

    @property
    def peak(self) -> int:
        """Highest number of live bytes over all phases."""
        return max(self._peaks.values(), default=0)

    def start_phase(self, name: str) -> None:
        """Begin a phase; it may begin several times."""
        self._phase = name
        self._update_peak()

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors as `part` from now on."""
        for tensor in tensors:
            self._count(tensor, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator and count its results."""
        kwargs = kwargs or {}
        if func is _DEVICE:  # every second call, and it makes nothing
            self._operators += not self.paused
            return self._run_operator(func, args, kwargs)
        if self.paused:
            return self._run_operator(func, args, kwargs)
        if func is _ADD and _accumulates_gradient(*args):
            func = _ADD_IN_PLACE
        out = self._run_operator(func, args, kwargs)
        results = list(iterate_nested_tensors(out))
        for tensor in results:
            self._count(tensor)
        self._operators += 1
        # Not at an operator that only asks for sizes or a device: C++ calls those where nothing may be raised.
        if self._operators > self.max_operators and results and not func.is_view:
            raise ModelError(
                f"the training step runs more than {self.max_operators} operators, as one that goes through a row "
                "token by token (RWKV): a plan would take minutes",
                "a step that processes all tokens of a row at once",
                "`slimtune train` goes on without a plan",
            )
        if self.count_operators and results and not func.is_view:
            packet = func._overloadpacket
            flops = flop_registry.get(_IN_PLACE_PRODUCTS.get(packet, packet))
            operations = flops(*args, **kwargs, out_val=out) if flops else _count_expert_flops(packet, args)
            moved = sum(t.numel() * t.element_size() for t in iterate_nested_tensors((args, kwargs, out)))
            self.counts_by_operator_cost[operations, moved, results[0].dtype] += 1
            if packet in _FUSED_ATTENTION:
                first, causal, products = _FUSED_ATTENTION[packet]
                (_, heads, queries, size), keys = args[first].shape, args[first + 1].shape[2]
                pairs = _count_causal_pairs(keys) if len(args) > causal and args[causal] else queries * keys
                self.attention_flops_by_dtype[results[0].dtype] += 2 * products * heads * size * pairs
        return out

    def _run_operator(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        found = NotImplemented if self.find_result is None else self.find_result(func, args, kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found

    def _count(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            if part is not None:
                size, previous = self._storages[key]
                self.live[previous] -= size
                self.live[part] += size
                self._storages[key] = (size, part)
            return
        size = -(-storage.nbytes() // self.block) * self.block
        if self.separate_host and is_counting_allocations_as_host():
            part = "host"
        elif part is None:
            is_logits = self.vocab_size and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
            part = "logits" if is_logits else "activations"
        self._storages[key] = (size, part)
        self.live[part] += size
        if part == "host":
            self.host_peak = max(self.host_peak, self.live["host"])
        else:
            self._total += size
            self._update_peak()
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self.live[part] -= size
        if part != "host":
            self._total -= size

    def _update_peak(self) -> None:
        if self._total > self._peaks[self._phase]:
            self._peaks[self._phase] = self._total
            self.phases[self._phase] = dict(self.live)


def _count_expert_flops(packet: Any, args: tuple) -> int:
    """Return the FLOPs of a product of tokens with the experts of each, for which torch's registry has no entry."""
    products = _EXPERT_PRODUCTS.get(packet, 0)
    # Each row of the first matrix is multiplied with one of the second's matrices.
    return products * 2 * args[0].numel() * args[1].shape[-1] if products else 0


def _count_causal_pairs(tokens: int) -> int:
    """Return how many pairs of a query and a key torch's CPU kernel computes for a causal row: more than attend.

    It skips blocks of 512 keys that are above the diagonal for all of its 32, 64 or 256 queries. Measured at rows of 96
    to 2048 tokens, its time per pair counted so is the same within 4 %.
    """
    queries = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    starts = range(0, tokens, queries)
    return sum(min(queries, tokens - m) * min(tokens, -(-min(m + queries, tokens) // 512) * 512) for m in starts)


def iterate_nested_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts, and those that a tensor is packed in."""
    if is_traceable_wrapper_subclass(value):
        yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from iterate_nested_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from iterate_nested_tensors(item)


def _accumulates_gradient(total: Any, gradient: Any) -> bool:
    """Return whether autograd adds a gradient to a sum that only autograd references.

    With real tensors autograd adds in place here; with tensor subclasses, such as fake tensors, it makes a new tensor.
    Counting that tensor would plan the gradient of a tied embedding twice. The reference counts are those of a tensor,
    and of its storage, that autograd hands to an operator and nothing else holds.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    if not isinstance(gradient, Tensor) or total.shape != gradient.shape:
        return False
    return total._use_count() == 4 and torch._C._storage_Use_Count(total.untyped_storage()._cdata) == 2
