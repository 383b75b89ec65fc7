"""A frozen weight with low-rank updates that is never added up: `W + Σ s · L R`.

A module that multiplies by its parameter gets this object in the parameter's place. A product with it becomes a product
with W and two thin ones,

    x (W + s · L R) = x W + s · (x L) R            W (..., m, n), L (..., m, r), R (..., r, n)

so an update of W's size exists neither in the forward nor in the backward pass. PyTorch hands every function that gets
this object to `__torch_function__`, which knows the products by which transformers runs experts: `linear`, `matmul`,
`bmm` and `grouped_mm`, of the whole weight `(experts, m, n)`, of one expert or of one matrix per token. With any other
function, and with any other attribute, the sum is computed: the result is the same, at the price of its memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

Term = tuple[Tensor, Tensor, float]
"""`L (..., m, r)`, `R (..., r, n)` and the scale s."""
_SHARED_ATTRIBUTES = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_quantized",
    "dim", "size", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex", "is_contiguous",
    "data_ptr",
})  # fmt: skip
"""What does not depend on the values: the sum has it in common with W."""


class LowRankWeight:
    """`W + Σ s · L R`; see the top of this file.

    Args:
        weight: W, `(m, n)` or `(experts, m, n)`.
        terms: the updates, whose factors have the leading dimension of W.
    """

    def __init__(self, weight: Tensor, terms: Sequence[Term]) -> None:
        self.weight = weight
        self.terms = [(L.to(weight.dtype), R.to(weight.dtype), scale) for L, R, scale in terms]
        self._experts: list[list[Term]] | None = None
        self._needs_gradient = torch.is_grad_enabled()

    def materialize(self) -> Tensor:
        """Return the sum, `W`'s shape and dtype."""
        if self._needs_gradient and not torch.is_grad_enabled():
            # Inside an autograd function, whose backward pass would not know of L and R.
            raise RuntimeError("a function without gradients reads a weight whose low-rank update trains")
        total = self.weight
        with torch.autocast(total.device.type, enabled=False):
            for L, R, scale in self.terms:
                total = torch.baddbmm(total, L, R, alpha=scale) if L.dim() == 3 else total + L @ R * scale
        return total

    def __getitem__(self, index: Any) -> Any:
        """Return one expert's weight `(m, n)`, or for indexes `(tokens)` one per token, `(tokens, m, n)`."""
        single = isinstance(index, int) or (isinstance(index, Tensor) and not index.dim() and index.dtype != torch.bool)
        if self.weight.dim() == 3 and single:
            # Each expert's factors are views of one `unbind`, whose backward pass writes the gradient once. Indexing
            # writes one of the whole factor for each expert.
            if self._experts is None:
                pairs = [zip(L.unbind(), R.unbind(), strict=True) for L, R, _ in self.terms]
                scales = [scale for _, _, scale in self.terms]
                self._experts = [
                    [(*pair, scale) for pair, scale in zip(expert, scales, strict=True)]
                    for expert in zip(*pairs, strict=True)
                ]
            return LowRankWeight(self.weight[index], self._experts[int(index)])
        if self.weight.dim() == 3 and isinstance(index, Tensor) and index.dim() == 1:
            return LowRankWeight(self.weight[index], [(L[index], R[index], scale) for L, R, scale in self.terms])
        return self.materialize()[index]

    def transpose(self, dim0: int, dim1: int) -> Any:
        if {dim0 % self.weight.dim(), dim1 % self.weight.dim()} != {self.weight.dim() - 2, self.weight.dim() - 1}:
            return self.materialize().transpose(dim0, dim1)
        return LowRankWeight(self.weight.mT, [(R.mT, L.mT, scale) for L, R, scale in self.terms])

    def t(self) -> Any:
        return self.transpose(0, 1)

    mT = property(lambda self: self.transpose(-2, -1))
    T = property(lambda self: self.transpose(0, 1) if self.weight.dim() == 2 else self.materialize().T)

    def __matmul__(self: Any, other: Any) -> Any:
        return torch.matmul(self, other)

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.weight if name in _SHARED_ATTRIBUTES else self.materialize(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(getattr(func, "__name__", ""))
        result = NotImplemented if product is None else product(func, *args, **kwargs)
        if result is NotImplemented:
            args, kwargs = tree_map(lambda a: a.materialize() if isinstance(a, cls) else a, (args, kwargs))
            result = func(*args, **kwargs)
        return result


def _add_update(y: Tensor, weight: LowRankWeight, update: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    for L, R, scale in weight.terms:
        y = y + update(L, R, scale)
    return y


def _linear(func: Callable, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, LowRankWeight) or isinstance(x, LowRankWeight):
        return NotImplemented
    return _add_update(func(x, weight.weight, bias), weight, lambda L, R, s: func(func(x, R) * s, L))


def _matmul(func: Callable, left: Any, right: Any) -> Any:
    if not isinstance(left, LowRankWeight):
        return _add_update(func(left, right.weight), right, lambda L, R, s: func(func(left, L) * s, R))
    if isinstance(right, LowRankWeight):
        return NotImplemented
    return _add_update(func(left.weight, right), left, lambda L, R, s: func(L, func(R, right) * s))


def _grouped_mm(func: Callable, x: Any, weight: Any, offs: Tensor | None = None, **settings: Any) -> Any:
    if not isinstance(weight, LowRankWeight) or offs is None or any(v is not None for v in settings.values()):
        return NotImplemented
    y = func(x, weight.weight, offs=offs)
    for L, R, scale in weight.terms:
        # The kernel reads rows of whole 16 bytes.
        missing = -L.shape[-1] % (16 // L.element_size())
        if missing:
            L, R = F.pad(L, (0, missing)), F.pad(R, (0, 0, 0, missing))
        y.add_(func(func(x, _with_unit_stride(L), offs=offs) * scale, _with_unit_stride(R), offs=offs))
    return y


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if 1 in x.stride()[-2:] else x.contiguous()


def _embedding(func: Callable, x: Any, weight: Any, *args: Any, padding_idx: int | None = None, **settings: Any) -> Any:
    # A row of padding gets no gradient, which the factors cannot express; `max_norm` writes into W.
    if not isinstance(weight, LowRankWeight) or args or padding_idx is not None or any(settings.values()):
        return NotImplemented
    return _add_update(func(x, weight.weight), weight, lambda L, R, s: func(x, L) * s @ R)


_PRODUCTS: dict[str, Callable] = {
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "_grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm, "embedding": _embedding,
}  # fmt: skip


def _make_operator(name: str) -> Callable:
    return lambda self, *others: getattr(self.materialize(), name)(*others)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow", "eq", "ne", "iter"):
    setattr(LowRankWeight, f"__{_name}__", _make_operator(f"__{_name}__"))
