"""The contract between a method and the adapted layer.

A method adds an **adapter module** at a **site**, one place in the frozen base model. Adapter modules at one site nest:
each sees everything inside it (the base module and the adapter modules added before) as one frozen function. So
several adapters of different methods run, and merge, in the order in which they are active.

    site kind     base module at the site           what an adapter module defines
    "linear"      y = W x + b                       `forward(x, y)`, or `forward_with_base(base, x)` if it changes the
    "embedding"   y = W[:, x]                       input or reads W; `merge_into(W, b)`; `low_rank_factors()`
    "conv"        y = W ∗ x + b, a convolution      the same, with W as a matrix `(out, in / groups · kernel size)`
    "weight"      nn.MultiheadAttention, out_proj   `merge_into(W, b)` alone: W is read without a call of the module
    "norm"        a normalisation with a weight     the same
    "parameters"  any module with parameters        `forward_with_base`, `merge_into_parameter`
    "block"       any module that returns (..., d)  `forward(x, y)` on hidden states: see `SubLayerOutputAdapter`
    "attention"   the attention module of a layer   `compute_prefix_key_values(module, rows)`: see `prompt_modules.py`
    "model"       the whole backbone                `virtual_embeddings()`: see `prompt_modules.py`;
                                                    or `SharedParameterHolder`

An adapter module never sees another adapter, a quantized weight or a transposed weight layout: the adapted layer
(`adapted_layer.py`) and `BaseForward` handle those. Shapes: `x (..., in)`, `y (..., out)`, `W (out, in)`, `b (out)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...errors import UnsupportedTargetError
from ..attention.packed_layout import RowMask as RowMask  # methods import it from here
from ..kernels.linear_layers import get_dequantized_weight, get_weight_and_bias_names, is_plain_linear_forward
from ..kernels.lora_linear import add_low_rank_to_weight, add_low_rank_update, low_rank_linear
from .architectures import get_text_config
from .peft_config import SiteKind as SiteKind

WEIGHT_KINDS = frozenset[SiteKind](["linear", "embedding", "conv", "weight"])
"""The kinds of site whose module has a weight matrix."""


@dataclass(frozen=True)
class AdapterSite:
    """One place in the base model where a method may add an adapter module.

    Args:
        name: dotted name of the module in the base; "" is the model itself.
        kind: see the table above. An embedding's `x (...)` contains row indices.
        in_features, out_features: columns and rows of `W`; the model's hidden size for blocks, attention and the model.
        device: device of the base's weight.
        dtype: dtype of the adapter's parameters.
        module, model: the base module and the whole model, for reading only; do not keep a reference.
        skip_init: True if a file's tensors will replace the initial values, or there are none (meta): any will do.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype
    module: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    model: nn.Module = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    skip_init: bool = False

    @property
    def init_device(self) -> torch.device:
        """Device on which to draw random numbers: the CPU, as PEFT does, or meta for a model without values."""
        return self.device if self.device.type == "meta" else torch.device("cpu")

    @property
    def config(self) -> Any:
        """Config of the model's text part, None if the model is not a transformers model."""
        return get_text_config(self.model)

    def weight(self) -> Tensor:
        """Return the frozen weight `(out, in)`, dequantized, in fp32 or wider."""
        weight = get_dequantized_weight(self.module).detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def bias(self) -> Tensor | None:
        return getattr(self.module, get_weight_and_bias_names(self.module)[1], None)

    def require_ungrouped(self, method: str) -> tuple[int, ...]:
        """Return a convolution's kernel size; raise UnsupportedTargetError if it has groups."""
        conv: Any = self.module
        if conv.groups > 1:
            message = f"{method} does not support {type(conv).__name__} layers with groups > 1"
            raise UnsupportedTargetError(f"{message}: {self.name} has {conv.groups}", "a convolution without groups")
        return tuple(conv.kernel_size)


class UndoableLayerReplication(Protocol):
    """What a method's config changed in the base before the first adapter was attached, to put it back."""

    @property
    def ranges(self) -> Any:
        """What the config asked for; further adapters must ask for the same."""

    @property
    def config_values(self) -> dict[str, Any]:
        """The replaced values of the config of the model's text part."""

    def undo(self, model: nn.Module) -> None:
        """Put the base back as it was."""


class BaseForward:
    """Callable that runs everything inside an adapter module at its site. Valid for one forward call; do not keep it.

    Args:
        module: the base module.
        run: runs the base module with `inner_modules` around it.
        inner_modules: adapter modules that were added before this one, innermost first.
    """

    __slots__ = ("inner_modules", "module", "run")

    def __init__(self, module: nn.Module, run: Callable[..., Any], inner_modules: Sequence[AdapterModule] = ()) -> None:
        self.module, self.run, self.inner_modules = module, run, inner_modules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def bias(self) -> Tensor | None:
        """Return the base's own bias `(out)`, or None."""
        return getattr(self.module, get_weight_and_bias_names(self.module)[1], None)

    def weight(self) -> Tensor:
        """Return the weight `(out, in)` that a call uses: the base's own tensor if there are no inner modules."""
        return self.merge_weight_and_bias()[0]

    def merge_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the base and the inner modules merged into one weight `(out, in)` and one bias `(out)` or None."""
        weight, bias = get_dequantized_weight(self.module), self.bias()
        if self.inner_modules:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        for inner in self.inner_modules:
            weight, bias = inner.merge_into(weight, bias)
        return weight, bias

    def plus_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        """Return `base(x) + scale · B A dropout(x)`, fused into one autograd step if the base is a plain linear layer.

        Shapes: `x (..., in)`, `A (r, in)`, `B (out, r)`. `dropout` is a probability in [0, 1).
        """
        if not self.inner_modules and is_plain_linear_forward(self.run):
            weight = get_dequantized_weight(self.module)
            if not weight.requires_grad:
                return low_rank_linear(x, weight, self.bias(), A, B, scale, dropout)
        return add_low_rank_update(self(x), x, A, B, scale, dropout)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the base's convolution of `x (batch, in, ...)` with another weight matrix, and without bias."""
        conv: Any = self.module
        return self.run_base_with({"weight": weight.reshape(conv.weight.shape), "bias": None}, x)

    def run_base_with(self, parameters: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the base module's own forward with other tensors in place of its parameters, without modifying it."""
        # A shallow copy of the module that shares everything but the table of parameters. An entry in
        # `original_parameters` makes an adapted module run its base's forward with the parameters as they are.
        module_copy: Any = object.__new__(type(self.module))
        table = {**{n: getattr(self.module, n) for n in self.module._parameters}, **parameters}
        module_copy.__dict__ = {**vars(self.module), "_parameters": table, "original_parameters": {}}
        return type(module_copy).forward(module_copy, *args, **kwargs)


class AdapterModule(nn.Module):
    """What a method adds at one site; the table at the top of this file says what a subclass defines."""

    optional: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors that a file may leave out."""
    frozen_names: Collection[str] = ()
    """Names of parameters that do not train."""
    takes_row_mask: ClassVar[bool] = False
    """Whether `forward_with_base` takes `rows`, the rows of a mixed batch that use this adapter (None: all)."""
    takes_tokens: ClassVar[bool] = False
    """Whether `forward_with_base` takes `tokens`, the indices of the only tokens that it may change."""
    base_can_store_merge: bool = True
    """Whether the base has a parameter that can store the result of `merge_into`."""
    adapted_parameters: Sequence[str] = ()
    """At a "parameters" site: names of the base's parameters that `merge_into_parameter` changes."""
    is_tuner_layer: ClassVar[bool] = True
    """Whether PEFT makes the module at such a site a `BaseTunerLayer`."""
    peft_values: ClassVar[Mapping[str, str]] = {}
    """Attributes that are no tensors, by PEFT's names for them: `{"scaling": "scale"}`."""
    peft_modules: ClassVar[Collection[str]] = ()
    """Parameters that are the `weight` of a module in PEFT."""
    scales_input: ClassVar[bool] = False
    """Whether the module scales the layer's input: a feed-forward layer of (IA)³."""
    no_op_values: ClassVar[Mapping[str, float] | None] = None
    """Tensors by name, and the values at which the module changes nothing, where these are the same at each site."""
    shared: Sequence[Any] = ()
    """Modules at other sites whose parameters this one uses: in a tuple, so that PyTorch registers them once."""
    method: str = ""
    """The method's name, set when the module is attached."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the input `x (..., in)` and the frozen output `y (..., out)` to the adapted output `(..., out)`."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, y)")

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Any:
        """Run the base and adapt its output: `x (..., in)` to `(..., out)`."""
        return self(x, base(x))

    def forward_batch_rows(
        self, base: BaseForward, plain_base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a batch of which only `rows`, bool `(batch,)`, use this adapter; `args[0]` is `x (batch, ..., in)`.

        `base` includes the adapter modules of the other rows; `plain_base`, the base module alone, is that of `rows`.
        """
        if self.takes_row_mask:
            return self.forward_with_base(base, *args, rows=rows, **kwargs)  # type: ignore[call-arg]
        x, y = args[0], base(*args, **kwargs)
        if type(self).forward_with_base is AdapterModule.forward_with_base:
            adapted = self(x[rows], y[rows])
        else:
            adapted = self.forward_with_base(plain_base, x[rows])
        return y.index_put((rows,), adapted.to(y.dtype))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a new weight `(out, in)` and bias `(out)` that include this module's change, by default its factors'.

        The weight is in fp32 or wider; the caller rounds the result once. A bias that does not change is returned as
        the same object. A method that does not change weights raises MergeUnsupported.
        """
        factors = self.low_rank_factors()
        if factors is None:
            raise MergeUnsupported(f"{type(self).__name__} does not change a weight, so it cannot be merged")
        return add_low_rank_to_weight(weight, *factors), bias

    def merge_into_parameter(self, name: str, parameter: Tensor) -> Tensor:
        """Return a new value of one of `adapted_parameters`, in the given one's layout; dtypes as in `merge_into`."""
        raise MergeUnsupported(f"{type(self).__name__} does not change the parameter {name}")

    def replaced_rows(self) -> frozenset[int]:
        """Return the rows of the base's weight that the module replaces: only one adapter at a time can."""
        return frozenset()

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A (r, in), B (out, r), scale)` if this module computes `y + scale · B A x` now, else None.

        Mixed batches, weighted merges, hot-swapping and export as LoRA work for modules that return factors.
        """
        return None

    def get_no_op_values(self, site: AdapterSite) -> Mapping[str, Tensor | float]:
        """Return tensors by name, and their values at which the module changes nothing.

        Moved toward them in a straight line, together, they make the change smaller: see `extras/adapter_strength.py`.
        """
        return self.no_op_values or {}

    @property
    def has_strength(self) -> bool:
        """Whether it has such values, so that its change can be made smaller."""
        return self.no_op_values is not None or type(self).get_no_op_values is not AdapterModule.get_no_op_values

    def make_base_config(self, module: nn.Module) -> Any:
        """Return the config that the base module reads while it has this adapter; None: its own."""

    def expert_factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return `A (experts, r, in)`, `B (experts, out, r)` and s by parameter, if it only changes stacked experts."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{n} {tuple(p.shape)}" for n, p in self._parameters.items() if p is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a file stores, by name relative to the site: parameters and persistent buffers."""
        return dict(self.state_dict(keep_vars=True))

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: AdapterSite) -> None:
        """Prepare for a file's tensors, by name relative to the site, before they are copied into `tensors()`."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return state that training needs to resume but an adapter file does not store; on meta: all it can become."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` returned, after the file's tensors were loaded."""

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that train."""
        return [p for n, p in self.named_parameters() if n not in self.frozen_names]

    def lr_multipliers(self) -> dict[str, float]:
        """Return factors on the learning rate, by parameter name; parameters that are not listed have factor 1."""
        return {}


class SharedParameterHolder(AdapterModule):
    """Parameters at the model's site that adapter modules at other sites share; its own forward changes nothing.

    The other modules set `self.shared = (holder,)`: tiles (`train.mlp_tile_size`) find trained parameters there.
    """

    takes_row_mask = True
    is_tuner_layer = False
    no_op_values: ClassVar = {}

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class SubLayerOutputAdapter(AdapterModule):
    """Adapter module after a sub-layer: `forward(x, y)` maps its input and output `(..., d)` to `(..., d)`.

    If the sub-layer returns a tuple (such as attention output and weights), the first element is adapted.
    """

    takes_row_mask = True

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        output = base(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        adapted = self(x, y) if rows is None else y.index_put((rows,), self(x[rows], y[rows]).to(y.dtype))
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class MergeUnsupported(ValueError, RuntimeError):
    """An adapter module's change cannot be merged into a weight."""
