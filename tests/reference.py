"""Slow and simple ways to a result, to compare with: rows alone, plain autograd, dense masks; and counts of memory."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimtune.core.adapters.adapted_layer import AdaptedLayerMixin
from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.core.training.loss import count_supervised_targets


@contextmanager
def compute_in_float64() -> Iterator[None]:
    """Let transformers compute in float64 what it computes in fp32 whatever the model's dtype (norms, softmax).

    Without it a float64 model rounds to fp32 here and there, and two exact ways differ by 1e-8.
    """

    def widen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            return function(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

        return run

    with (
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.Tensor, "to", widen(torch.Tensor.to)),
        patch.object(F, "softmax", widen(F.softmax)),
    ):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return random float64 numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def unfused_lora() -> Iterator[None]:
    """Compute LoRA as PEFT does inside the `with`: operator by operator, each module for itself."""

    def run(module: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if "default" not in module.adapters:  # it has its own copy of the weight
            return base(x)
        lora = module.adapters["default"]
        dropout = lora.lora_dropout.p if isinstance(lora.lora_dropout, nn.Dropout) and module.training else 0.0
        return base(x) + lora.scale * F.linear(F.linear(F.dropout(x, dropout), lora.lora_A.weight), lora.lora_B.weight)

    with patch.object(AdaptedLayerMixin, "run_adapted", run):
        yield


def enlarge_weights(model: nn.Module) -> None:
    """Make a new model's weights as large as a trained one's, so that tokens change each other's hidden states.

    And an adapter does not outweigh them: the gradient of a rank-1 update alone before a norm is zero up to rounding.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2).to(p.dtype))


def row(ids: list[int], supervised: Collection[int]) -> dict[str, list[int]]:
    """Return a row that learns the tokens at some positions."""
    return {"input_ids": ids, "labels": [t if i in supervised else -100 for i, t in enumerate(ids)]}


def loss_of_separate_rows(model: nn.Module, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Return the mean loss of all supervised tokens: each row through the model's own forward, with its own loss."""
    counts = [count_supervised_targets(row) for row in rows]
    losses = []
    for row, n in zip(rows, counts, strict=True):
        if n:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            losses.append(model(input_ids=ids, labels=labels, use_cache=False).loss * n)
    return torch.stack(losses).sum() / sum(counts)


def get_gradients(model: nn.Module, backward: Callable[[], None]) -> dict[str, Tensor]:
    """Return the gradient of each trained parameter after `backward`."""
    model.zero_grad()
    backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    assert trained
    assert not missing, f"no gradient: {missing}"
    return {n: p.grad.clone() for n, p in trained.items()}


def slope_along(p: Tensor, direction: Tensor, compute: Callable[[], Tensor], step: float = 1e-5) -> float:
    """Return the derivative of what is computed along a direction of a parameter, by central differences."""
    value, results = p.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            p.copy_(value + sign * step * direction)
            results.append(compute().item())
        p.copy_(value)
    return (results[0] - results[1]) / (2 * step)


def largest_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest ‖a − b‖ / ‖b‖ of all tensors."""
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def dense_mask(layout: PackedLayout, window: int | None = None) -> Tensor:
    """Return which keys each token of a layout attends to, bool `(tokens, prefix_keys + tokens)`, token by token."""
    first = [layout.num_prefix_keys + sum(layout.lengths[:i]) for i in range(len(layout.lengths))]
    mask = torch.zeros(layout.total, layout.num_prefix_keys + layout.total, dtype=torch.bool)
    for segment, n in enumerate(layout.lengths):
        for t in range(n):
            # From the token back to the start of its row, then over the prefix keys.
            keys, at, last = [], segment, t
            while at >= 0:
                keys += range(first[at] + last, first[at] - 1, -1)
                at = layout.parents[at]
                last = layout.lengths[at] - 1
            keys += range(layout.num_prefix_keys - 1, -1, -1)
            mask[first[segment] - layout.num_prefix_keys + t, keys[:window]] = True
    return mask


def saved_for_backward(run: Callable[[], Any], ignore: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the tensors that `run` saves for the backward pass, each storage once, random states included.

    Args:
        run: returns a tensor, or several.
        ignore: tensors that would be there anyway (parameters).
    """
    found: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        out = run()
    nodes, visited = [t.grad_fn for t in ([out] if isinstance(out, Tensor) else out)], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in visited:
            visited.add(node)
            found += [v for v in getattr(node, "__dict__", {}).values() if isinstance(v, Tensor)]
            nodes += [before for before, _ in node.next_functions]
    ignored = {t.untyped_storage().data_ptr() for t in ignore}
    return list({p: t for t in found if (p := t.untyped_storage().data_ptr()) not in ignored}.values())


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


class AllocationRecorder(TorchDispatchMode):
    """Records the storages made inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # bytes
        self._all: list[ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self._all.append(ref(storage))
        return out

    def live_bytes(self, ignore: Sequence[Tensor]) -> int:
        """Return the bytes of the storages that still exist, apart from those of `ignore`."""
        ignored = {t.untyped_storage().data_ptr() for t in ignore}
        live = {s.data_ptr(): s.nbytes() for r in self._all if (s := r()) is not None}
        return sum(n for pointer, n in live.items() if pointer not in ignored)
