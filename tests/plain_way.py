"""The plain way to a gradient, for what is faster to be compared with: each row alone, PyTorch's own autograd."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimtune.adapters.layer import AdaptedLayer
from slimtune.attention.packed_layout import PackedLayout
from slimtune.train_step.loss import count_targets

Example = dict[str, Any]


@contextmanager
def wide() -> Iterator[None]:
    """Let what transformers computes in fp32 whatever the model's dtype (norms, rotations, softmax) be float64.

    Without it a float64 model rounds to fp32 here and there, and two exact ways differ by 1e-8.
    """

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            return function(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

        return run

    with (
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.Tensor, "to", widened(torch.Tensor.to)),
        patch.object(F, "softmax", widened(F.softmax)),
    ):
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Compute LoRA as PEFT does for the length of the `with`: operator by operator, each module for itself."""

    def run(module: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if "default" not in module.adapters:  # it has its own copy of the weight
            return base(x)
        lora = module.adapters["default"]
        drop = lora.lora_dropout.p if isinstance(lora.lora_dropout, nn.Dropout) and module.training else 0.0
        A, B = lora.lora_A.weight, lora.lora_B.weight
        return base(x) + lora.scale * F.linear(F.linear(F.dropout(x, drop), A), B)

    with patch.object(AdaptedLayer, "run_adapted", run):
        yield


def loud(model: nn.Module, seed: int = 1) -> None:
    """Make a new model's weights as large as a trained one's: what one token says to another then shows.

    And an adapter does not outweigh them: a rank-1 update that is all there is before a norm has a gradient that is
    zero but for rounding, of which nothing relative can be said.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2).to(p.dtype))


def alone(model: nn.Module, rows: Sequence[Example]) -> Tensor:
    """Return the mean loss of all supervised tokens: each row through the model's own forward, with its own loss."""
    counts = [count_targets(row) for row in rows]
    losses = []
    for row, n in zip(rows, counts, strict=True):
        if n:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            losses.append(model(input_ids=ids, labels=labels, use_cache=False).loss * n)
    return torch.stack(losses).sum() / sum(counts)


def gradients(model: nn.Module, backward: Callable[[], None]) -> dict[str, Tensor]:
    """Return the gradient of each trained parameter after `backward`."""
    model.zero_grad()
    backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    assert trained
    assert not missing, f"no gradient: {missing}"
    return {n: p.grad.clone() for n, p in trained.items()}


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest ‖a − b‖ / ‖b‖ over all tensors."""
    assert got.keys() == want.keys()
    return max(((got[n] - want[n]).norm() / want[n].norm()).item() for n in want)


def dense_mask(layout: PackedLayout, window: int | None = None) -> Tensor:
    """Return which keys each token of a layout attends to, bool `(tokens, prefix_keys + tokens)`, token by token."""
    first = [layout.prefix_keys + sum(layout.lengths[:i]) for i in range(len(layout.lengths))]
    mask = torch.zeros(layout.total, layout.prefix_keys + layout.total, dtype=torch.bool)
    for segment, n in enumerate(layout.lengths):
        for t in range(n):
            # From the token back to the start of its row, then over the prefix keys.
            keys, at, last = [], segment, t
            while at >= 0:
                keys += range(first[at] + last, first[at] - 1, -1)
                at = layout.parents[at]
                last = layout.lengths[at] - 1
            keys += range(layout.prefix_keys - 1, -1, -1)
            mask[first[segment] - layout.prefix_keys + t, keys[:window]] = True
    return mask


def kept_for_backward(run: Callable[[], Any], apart_from: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return what `run` leaves for the backward pass, each storage once; random states held by a function count, too.

    Args:
        run: returns a tensor, or several.
        apart_from: tensors that would be there anyway (parameters).
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run()
    nodes = [t.grad_fn for t in ([out] if isinstance(out, Tensor) else out)]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [v for v in getattr(node, "__dict__", {}).values() if isinstance(v, Tensor)]
            nodes += [before for before, _ in node.next_functions]
    own = {t.untyped_storage().data_ptr() for t in apart_from}
    return list({p: t for t in found if (p := t.untyped_storage().data_ptr()) not in own}.values())


def size(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of some tensors' storages."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


class Made(TorchDispatchMode):
    """What is made for the length of the `with`: `largest`, in bytes, and what of it `lives`."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._all: list[ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self._all.append(ref(storage))
        return out

    def lives(self, apart_from: Sequence[Tensor]) -> int:
        """Return the bytes that are still held, by whomever, apart from those of what was given."""
        own = {t.untyped_storage().data_ptr() for t in apart_from}
        held = {s.data_ptr(): s.nbytes() for r in self._all if (s := r()) is not None}
        return sum(n for at, n in held.items() if at not in own)
