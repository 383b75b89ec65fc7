"""The contract between a method and the one adapted layer.

A method puts a **delta** at a **site**, one place in the frozen base. Deltas nest: each sees what lies below it, the
base's module and the deltas put there before, as one frozen function. So several adapters, of whatever methods, mean
the same run one after the other, and merged one after the other.

    kind of site    the base's module there             what a delta defines
    "linear"        y = W x + b                         `forward(x, y)`; or `forward_with_base(frozen, x)` where it changes the
    "embedding"     y = W[:, x]                         input or reads the weight; `merge_into(W, b)`; `low_rank_factors()`
    "norm"          a normalisation with a weight       the same
    "block"         any module that gives (..., d)      `forward(x, y)` on hidden states: see `Block`
    "attention"     the attention of a layer            `prefix(module, rows)`: see `attention/prefix.py`
    "model"         the whole backbone                  `virtual()`: see `adapters/prompt.py`; or a `Holder`

A delta never sees another adapter, a quantized weight or a transposed layout: the adapted layer (`adapters/layer.py`) and
`Frozen` own those. Shapes: `x (..., in)`, `y (..., out)`, `W (out, in)`, `b (out)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels.lora_linear import low_rank_linear, plus_low_rank
from ..utils.linear_layers import get_weight, is_plain_forward
from .architectures import text_config

SiteKind = Literal["linear", "embedding", "norm", "block", "attention", "model"]
RowMask = Tensor | None
"""Which rows of a batch a delta is for, as a bool `(batch,)`; None: all."""


@dataclass(frozen=True)
class Site:
    """One place in the base where a method may add a delta.

    Args:
        name: dotted name of the module in the base; "" is the model itself.
        kind: what is there; see the top of this file. For an embedding `x (...)` holds row numbers below `in_features`.
        in_features: columns of `W`; elsewhere the model's hidden size.
        out_features: rows of `W`; elsewhere the model's hidden size.
        device: where the base's weight lies.
        dtype: dtype the adapter's parameters get.
        module: the module itself, to be read and never kept.
        model: the whole model, to be read and never kept.
        loading: a file's tensors will be copied in: a costly start need not be computed.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype
    module: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    model: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    loading: bool = False

    @property
    def init_device(self) -> torch.device:
        """Where random numbers are drawn: on the CPU, as PEFT draws them, except on meta where there are none."""
        return self.device if self.device.type == "meta" else torch.device("cpu")

    @property
    def config(self) -> Any:
        """The text model's config, None for a model that is not transformers'."""
        return text_config(self.model)

    def weight(self) -> Tensor:
        """Return the frozen weight `(out, in)`, dequantized, in fp32 at least."""
        weight = get_weight(self.module).detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def bias(self) -> Tensor | None:
        """Return the frozen bias `(out)`, None where there is none."""
        return getattr(self.module, "bias", None)


class BaseForward:
    """What lies below a delta at its site: call it to run it. Made anew for each call; keep nothing of it."""

    __slots__ = ("below", "module", "run")

    def __init__(self, module: nn.Module, run: Callable[..., Any], below: Sequence[AdapterModule] = ()) -> None:
        self.module, self.run, self.below = module, run, below

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's module with the deltas below."""
        return self.run(*args, **kwargs)

    def weight(self) -> Tensor:
        """Return the weight `(out, in)` that `self` multiplies by: the base's own tensor where nothing lies below."""
        return self.weight_and_bias()[0]

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return what lies below as one weight `(out, in)` and one bias `(out)`, None where there is none."""
        weight, bias = get_weight(self.module), self.bias()
        if self.below:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        for delta in self.below:
            weight, bias = delta.merge_into(weight, bias)
        return weight, bias

    def bias(self) -> Tensor | None:
        """Return the base's bias `(out)`, None where there is none."""
        return getattr(self.module, "bias", None)

    def plus_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, drop: float = 0.0) -> Tensor:
        """Run what lies below and add `scale · B A d(x)`: one step of autograd where that is a plain frozen map.

        Args:
            x: `(..., in)`.
            A: `(r, in)`.
            B: `(out, r)`.
            scale: the update's.
            drop: probability of leaving out an input of A.
        """
        if not self.below and is_plain_forward(self.run):
            weight = get_weight(self.module)
            if not weight.requires_grad:
                return low_rank_linear(x, weight, self.bias(), A, B, scale, drop)
        return plus_low_rank(self(x), x, A, B, scale, drop)

    def alone_with(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        """Run the base's module alone, with other tensors in place of its parameters; the module is not touched."""
        twin: Any = object.__new__(type(self.module))
        # `_kept`, as after a merge: an adapted module runs its base's forward with the parameters that stand there.
        own = {**self.module._parameters, **parameters}
        twin.__dict__ = {**vars(self.module), "_parameters": own, "_kept": {}}
        return type(twin).forward(twin, *args)


class AdapterModule(nn.Module):
    """What a method adds at one site; see the top of this file for what a subclass defines."""

    optional: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors a file may leave out: the delta knows how to go on without."""
    uses_attention_prefix: ClassVar[bool] = False
    """Whether the module passes learned keys and values to the attention function; see `attention/prefix.py`."""
    has_base_parameter: bool = True
    """Whether the base has a parameter that could hold what `merge_into` gives."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the input `x (..., in)` and the frozen output `y (..., out)` to the adapted output `(..., out)`."""
        raise TypeError(f"{type(self).__name__} defines no forward(x, y)")

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Any:
        """Run what lies below and change its answer: `x (..., in)` to `(..., out)`."""
        return self(x, frozen(x))

    def forward_batch_rows(self, frozen: BaseForward, base: BaseForward, rows: Tensor, x: Tensor) -> Any:
        """The same where only some rows of the batch are this delta's.

        Args:
            frozen: what lies below, with other rows' deltas in it.
            base: the base's module alone, which is what lies below the rows meant here.
            rows: bool `(batch,)`.
            x: `(batch, ..., in)`.
        """
        y = frozen(x)
        mine = (
            self(x[rows], y[rows])
            if type(self).forward_with_base is AdapterModule.forward_with_base
            else self.forward_with_base(base, x[rows])
        )
        return y.index_put((rows,), mine.to(y.dtype))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight `(out, in)` and bias that alone do what these and this delta do together, as new tensors.

        Args:
            weight: the frozen weight, in fp32 or wider; the caller rounds the result once.
            bias: the frozen bias, None where there is none. Return it as it is where the delta does not change it.

        Raises:
            MergeRefused: the method's change is no change of a weight.
        """
        raise MergeUnsupported(f"{type(self).__name__} cannot be merged into a weight")

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A (r, in), B (out, r), scale)` where this delta is `y + scale · B A x` at this moment, else None.

        Batched rows, weighted merges, hot-swapping and export to LoRA's formats come with it.
        """
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of this delta, by name below its site: its parameters and persistent buffers."""
        return dict(self.state_dict(keep_vars=True))

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Get ready for a file's tensors, by their names below the site, before they are copied into `tensors()`."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training goes on from that a file does not hold, by name; a run's checkpoints keep it.

        On meta, where nothing trains, all it can come to be: plans ask how large checkpoints get.
        """
        return {}

    def load_extra_state(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from what `extra_state` returned, after the file's tensors were copied in."""

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that train; all, unless a method keeps some as they are."""
        return self.parameters()

    def lr_multipliers(self) -> dict[str, float]:
        """Return factors on the learning rate, by parameter name, where they are not 1."""
        return {}


class SharedParameters(AdapterModule):
    """Holds, at the model, parameters that deltas at other sites share; runs what lies below as it is.

    Deltas keep it as `self.held = (holder,)`: a tuple, so that its parameters are registered once.
    """

    def forward_with_base(self, frozen: BaseForward, *args: Any, **kwargs: Any) -> Any:
        """Run what lies below."""
        return frozen(*args, **kwargs)

    def forward_batch_rows(
        self, frozen: BaseForward, base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run what lies below."""
        return frozen(*args, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return both as they are."""
        return weight, bias


class Block(AdapterModule):
    """A delta after a sub-layer: `forward(x, y)` maps its hidden states in and out, `(..., d)` each, to `(..., d)`.

    The sub-layer may return a tuple, of which the first is meant (attention and its weights).
    """

    def forward_with_base(self, frozen: BaseForward, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-layer and change the hidden states it gives."""
        return _first_changed(frozen(*args, **kwargs), lambda y: self(_hidden(args, kwargs), y))

    def forward_batch_rows(
        self, frozen: BaseForward, base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The same for some rows."""
        x = _hidden(args, kwargs)

        def change(y: Tensor) -> Tensor:
            return y.index_put((rows,), self(x[rows], y[rows]).to(y.dtype))

        return _first_changed(frozen(*args, **kwargs), change)


class MergeUnsupported(ValueError):
    """A delta is no change of a weight."""


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def _first_changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
