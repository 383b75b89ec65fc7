"""Weights in few bits: they are dequantized inside each product, and never kept in 16 bits.

A `QuantizedWeight` has the place, the shape and the dtype of the parameter that it replaces: the stacked experts of a
mixture `(experts, m, n)`, or the weight of a linear layer, which is treated as a single expert `(m, n)`. It contains
only packed tensors, each with the experts as its first dimension. What transformers does with the parameter before it
multiplies (one expert of it, some experts, transposed) returns another `QuantizedWeight` of the same packed tensors.
A product

    y = x W    and backward    ∂x = ∂y Wᵀ        x (tokens, m), W (m, n) of one expert or (experts, m, n) grouped

dequantizes W, multiplies and releases it; the backward pass dequantizes again. A product of all experts goes through
them in groups of `GROUP_BYTES`, and leaves out those that no token reached. W is frozen, so it has no gradient.

PyTorch hands every function that gets such a tensor to `__torch_function__`, which knows these products, and how
transformers stacks the experts of a checkpoint as it loads them. Any other computation gets the dequantized values, by
`__torch_dispatch__`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

GROUP_BYTES = 128 << 20
"""Dequantized experts that exist at a time in a product of all of them; at least one, and more if there are so many
that `MAX_GROUPS` would be exceeded."""
MAX_GROUPS = 32
_aten: Any = torch.ops.aten
_KEEPS_QUANTIZATION = {_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.lift_fresh}
"""Operators on the parameter itself whose result is quantized, too: applied to each packed tensor."""


class WeightFormat(ABC):
    """How weights are packed."""

    @abstractmethod
    def dequantize(self, packed: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weights `(experts, m, n)` in a shape and dtype from packed tensors `(experts, ...)`."""

    def concatenate(self, packed: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """Return weights `(experts, m, n)` side by side, `(experts, m, n + n + …)`, packed; None: they cannot be."""
        return None


class QuantizedWeight(Tensor):
    """Weights `(experts, m, n)`, or of one expert `(m, n)`, frozen and packed; see the top of this file.

    Args:
        packed: the packed tensors, by name, with the experts as first dimension.
        format: how they are packed.
        sizes: `(m, n)` as packed.
        dtype: of the dequantized weights.
        is_single: whether it stands for the one expert that it contains, `(m, n)`.
        is_transposed: whether it stands for `(..., n, m)`.
    """

    packed: dict[str, Tensor]
    format: WeightFormat
    sizes: tuple[int, int]
    is_single: bool
    is_transposed: bool

    @staticmethod
    def __new__(
        cls,
        packed: Mapping[str, Tensor],
        format: WeightFormat,
        sizes: Sequence[int],
        dtype: torch.dtype,
        is_single: bool = False,
        is_transposed: bool = False,
    ) -> Self:
        first = next(iter(packed.values()))
        shape = list(sizes[::-1] if is_transposed else sizes)
        if not is_single:
            shape.insert(0, len(first))
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=first.device)
        self.packed, self.format, self.sizes = dict(packed), format, (sizes[0], sizes[1])
        self.is_single, self.is_transposed = is_single, is_transposed
        return self

    def dequantized(self) -> Tensor:
        """Return the weights, dequantized."""
        experts = len(next(iter(self.packed.values())))
        weight = self.format.dequantize(self.packed, torch.Size((experts, *self.sizes)), self.dtype)
        weight = weight[0] if self.is_single else weight
        return weight.mT if self.is_transposed else weight

    def list_group_ends(self, offs: Tensor, rows: int) -> list[int]:
        """Return, for each expert, where its rows end among the rows of all experts."""
        return offs.tolist()

    def __getitem__(self, index: Any) -> Any:
        """Return one expert `(m, n)`, or for a slice or indexes `(tokens)` several, quantized; else values."""
        if self.is_single or not isinstance(index, int | slice | Tensor):
            return self.dequantized()[index]
        if isinstance(index, Tensor) and (index.dim() > 1 or index.dtype == torch.bool):
            return self.dequantized()[index]
        is_single = isinstance(index, int) or (isinstance(index, Tensor) and not index.dim())
        if not isinstance(index, slice) and is_single:
            index = slice(int(index), int(index) + 1 or None)
        return self._with({name: t[index] for name, t in self.packed.items()}, is_single=is_single)

    def transpose(self, dim0: int, dim1: int) -> Any:
        if {dim0 % self.dim(), dim1 % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            return self.dequantized().transpose(dim0, dim1)
        return self._with(self.packed, is_transposed=not self.is_transposed)

    def t(self) -> Any:
        return self.transpose(0, 1)

    mT = property(lambda self: self.transpose(-2, -1))
    T = property(lambda self: self.transpose(0, 1) if self.dim() == 2 else self.dequantized().T)
    nbytes = property(lambda self: sum(t.nbytes for t in self.packed.values()))

    def data_ptr(self) -> int:
        return next(iter(self.packed.values())).data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return next(iter(self.packed.values())).untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedWeight":
        copied = self._with({name: tensor.clone() for name, tensor in self.packed.items()})
        copied.__dict__.update({k: v for k, v in vars(self).items() if k not in vars(copied)})  # that of a Parameter
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {type(self.format).__name__})"

    def _with(self, packed: Mapping[str, Tensor], **changes: Any) -> "QuantizedWeight":
        kept = {"is_single": self.is_single, "is_transposed": self.is_transposed, **changes}
        return type(self)(packed, self.format, self.sizes, self.dtype, **kept)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the packed tensors as attributes, and what else makes this tensor; PyTorch's protocol."""
        how = (self.format, self.sizes, self.dtype, self.is_single, self.is_transposed)
        return list(self.packed), how

    def __getattr__(self, name: str) -> Any:
        packed = self.__dict__.get("packed", {})
        if name in packed:
            return packed[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def __tensor_unflatten__(cls, packed: Mapping[str, Tensor], how: Any, *_: Any) -> "QuantizedWeight":
        return cls(packed, *how)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = _FUNCTIONS.get(getattr(func, "__name__", ""))
        if function is not None and (result := function(func, *args, **kwargs)) is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        weight: Any = args[0] if args else None
        keeps = func.overloadpacket in _KEEPS_QUANTIZATION and isinstance(weight, cls)
        if keeps and kwargs.get("dtype") in (None, weight.dtype):
            kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
            return weight._with({n: func(t, *args[1:], **kwargs) for n, t in weight.packed.items()})
        args, kwargs = tree_map(lambda a: a.dequantized() if isinstance(a, cls) else a, (args, kwargs))
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """A product of x with a frozen quantized weight, of which nothing is kept in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, multiply: Callable) -> Tensor:
        ctx.weight, ctx.multiply = weight, multiply
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.multiply(grad.contiguous(), ctx.weight.mT), None, None


def _multiply_right(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return x @ weight.dequantized()


def _multiply_left(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return weight.dequantized() @ x


def _linear(func: Callable, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, QuantizedWeight) or isinstance(x, QuantizedWeight) or weight.dim() != 2:
        return NotImplemented
    y = _Product.apply(x, weight.mT, _multiply_right)
    return y if bias is None else y + bias


def _matmul(func: Callable, left: Any, right: Any) -> Any:
    quantized = [isinstance(a, QuantizedWeight) for a in (left, right)]
    if all(quantized) or left.dim() < 2 or right.dim() < 2 or left.dim() < right.dim():
        return NotImplemented  # PyTorch would broadcast a matrix, or a vector
    return _Product.apply(right, left, _multiply_left) if quantized[0] else _Product.apply(left, right, _multiply_right)


def _grouped_mm(func: Callable, x: Any, weight: Any, offs: Tensor | None = None, **settings: Any) -> Any:
    if not isinstance(weight, QuantizedWeight) or offs is None or any(v is not None for v in settings.values()):
        return NotImplemented
    ends = weight.list_group_ends(offs, len(x))

    def multiply(x: Tensor, weight: QuantizedWeight) -> Tensor:
        y = x.new_zeros(len(x), weight.shape[-1])
        reached = [e for e, end in enumerate(ends) if end > (ends[e - 1] if e else 0)]
        size = GROUP_BYTES // (math.prod(weight.sizes) * weight.element_size())
        size = max(1, size, -(-len(weight) // MAX_GROUPS))
        for group in (reached[i : i + size] for i in range(0, len(reached), size)):
            first, last = group[0], group[-1]
            start, end = ends[first - 1] if first else 0, ends[last]
            contiguous = last - first + 1 == len(group)
            experts = weight[slice(first, last + 1) if contiguous else offs.new_tensor(group, dtype=torch.long)]
            group_offs = offs.new_tensor([ends[e] - start for e in group])
            y[start:end] = func(x[start:end], experts.dequantized(), offs=group_offs)
        return y

    return _Product.apply(x, weight, multiply)


def _stack(func: Callable, weights: Sequence[Any], dim: int = 0) -> Any:
    first = weights[0]
    if dim or not all(_is_alike(w, first) and w.is_single for w in weights):
        return NotImplemented
    packed = {name: torch.cat([w.packed[name] for w in weights]) for name in first.packed}
    return first._with(packed, is_single=False)


def _cat(func: Callable, weights: Sequence[Any], dim: int = 0) -> Any:
    first = weights[0]
    alike = all(_is_alike(w, first) and w.is_transposed == first.is_transposed for w in weights)
    if not alike or dim % first.dim() != first.dim() - (2 if first.is_transposed else 1):
        return NotImplemented
    packed = first.format.concatenate([w.packed for w in weights])
    if packed is None:
        return NotImplemented
    sizes = first.sizes[0], sum(w.sizes[1] for w in weights)
    return type(first)(packed, first.format, sizes, first.dtype, first.is_single, first.is_transposed)


def _is_alike(weight: Any, other: Any) -> bool:
    return (
        isinstance(weight, QuantizedWeight)
        and isinstance(other, QuantizedWeight)
        and weight.format == other.format
        and {n: t.shape[1:-1] for n, t in weight.packed.items()} == {n: t.shape[1:-1] for n, t in other.packed.items()}
    )


_FUNCTIONS: dict[str, Callable] = {
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "__matmul__": _matmul,
    "grouped_mm": _grouped_mm, "_grouped_mm": _grouped_mm, "grouped_mm_fallback": _grouped_mm,
    "stack": _stack, "cat": _cat,
}  # fmt: skip


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is a `QuantizedWeight`; a layer becomes one by its `__class__`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dequantized(self) -> Tensor:
        """Return the weight `(out, in)`, dequantized."""
        weight: Any = self.weight
        return weight.dequantized()
