"""PEFT's names on adapted layers: `layer.lora_A["default"].weight`, `layer.scaling`, `isinstance(layer, LoraLayer)`.

PEFT wraps a module in a layer that holds a dictionary by adapter name for each of its tensors. Here an adapted module
stays itself and holds one adapter module per adapter (see `adapted_layer.py`). `get_peft_layer_attribute` translates: a
name that neither the base module nor its class has is looked up in the adapter modules, and the result is a dictionary
of the live objects.
The base's own names win, so an attention module keeps its own `scaling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from functools import cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.adapters.active_adapters import LayerAdapterOverride
from ..core.adapters.adapted_layer import ADAPTED_ATTRIBUTES, ADDED_CHILDREN, AdaptedLayerMixin
from ..core.adapters.merging import merge_adapters_into_layer, unmerge_adapters_from_layer
from ..core.kernels.linear_layers import (
    get_base_layer_type,
    get_dequantized_weight,
    get_in_and_out_features,
    is_quantized,
    is_weight_transposed,
)
from ..core.kernels.lora_linear import add_low_rank_to_weight
from .public_names import map_peft_class_prefixes_by_method


def get_peft_layer_attribute(layer: Any, name: str) -> Any:
    """Return what PEFT calls `name` on an adapted layer that has no such attribute.

    Raises:
        AttributeError: PEFT has no such name there.
    """
    # The whole model can be an adapted layer, too; it has names of its own.
    if name in _LAYER_NAMES and "_slimtune" not in vars(layer):
        return getattr(_PeftLayer(layer), name)
    view = None if name.startswith("_") else _collect_by_adapter(layer, name)
    if view is None:
        raise AttributeError(name)
    return view


def get_modules_to_save(layer: Any) -> nn.Module:
    """Return the child `modules_to_save` of a layer; it has bare parameters, and PEFT's has modules."""
    copies = get_fully_trained_copies(layer)
    return nn.ModuleDict(copies) if copies else layer._modules["modules_to_save"]


def format_layer_like_peft(layer: Any, base_module_text: str) -> str:
    """Return the text of an adapted layer as PEFT prints it: "lora.Linear(…)" around `base_module_text`."""
    modules = [] if "_slimtune" in vars(layer) else [*layer.adapters.values()]
    if not modules:
        return base_module_text
    if modules[0].adapted_parameters:
        what = f"ParamWrapper(\n  parameter_name={modules[0].parameter_name!r}, "
        base_module_text = what + base_module_text.removeprefix(f"{type(layer).__name__}(").lstrip()
    return f"{modules[0].method}.{base_module_text}"


# --- dictionaries by adapter name ---------------------------------------------------------------------------------


class _WriteThrough:
    """Mixed into a dictionary by adapter name: assigning an item sets the adapter module's attribute, too."""

    def __setitem__(self, adapter: str, value: Any) -> None:
        if "sources" in vars(self):
            module, attribute = vars(self)["sources"][adapter]
            if attribute in module._parameters and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, module._parameters[attribute].requires_grad)
            setattr(module, attribute, value)
        super().__setitem__(adapter, value)  # type: ignore[misc]


_VIEWS: WeakValueDictionary[tuple, Any] = WeakValueDictionary()


class _ModulesByAdapter(_WriteThrough, nn.ModuleDict):
    """The submodules with one name of a layer's adapter modules, by adapter."""


class _ParametersByAdapter(_WriteThrough, nn.ParameterDict):
    """The parameters with one name of a layer's adapter modules, by adapter."""


class BufferDict(nn.Module, MutableMapping):
    """Buffers by name, such as `nn.ParameterDict` is for parameters; they belong to the state dict if `persistent`."""

    def __init__(self, buffers: Any = (), persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers)

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__

    def __getitem__(self, name: str) -> Any:
        return self._buffers[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)


class _BuffersByAdapter(_WriteThrough, BufferDict):
    """The buffers with one name of a layer's adapter modules, by adapter."""


class _PerAdapterValues(_WriteThrough, dict):
    """Scalars with one name, such as `scaling`, of a layer's adapter modules, by adapter name."""


def _collect_by_adapter(layer: Any, name: str) -> Any:
    """Return what `name` is in each of the layer's adapter modules, by adapter; None if no module has it."""
    sources: dict[str, tuple[nn.Module, str]] = {}
    for adapter, module in layer.adapters.items():
        if name in module.peft_values:
            sources[adapter] = (module, module.peft_values[name])
        elif any(name in table for table in (module._parameters, module._modules, module._buffers)):
            sources[adapter] = (module, name)
    if not sources:
        return None
    # While someone has the dictionary, it is the same object, also for a module tied to this one.
    key = (name, *((a, id(getattr(*source))) for a, source in sources.items()))
    if (view := _VIEWS.get(key)) is not None:
        return view
    values = {a: _wrap_weight(module, name) for a, (module, name) in sources.items()}
    types: Any = {
        nn.Module: _ModulesByAdapter,
        nn.Parameter: _ParametersByAdapter,
        Tensor: _BuffersByAdapter,
        object: _PerAdapterValues,
    }
    view = next(v for t, v in types.items() if all(isinstance(x, t) for x in values.values()))()
    for adapter, value in values.items():
        view[adapter] = value
    vars(view)["sources"] = sources
    _VIEWS[key] = view
    return view


def _wrap_weight(module: Any, name: str) -> Any:
    """Return an attribute of an adapter module; in PEFT some of our parameters are the `weight` of a module."""
    value = getattr(module, name)
    if name not in module.peft_modules:
        return value
    holder = nn.Module()
    holder.weight = value
    return holder


class Bnb4bitBackend:
    """A weight that bitsandbytes stores in 4 bits."""

    backend_name = "bnb 4bit"


class Bnb8bitBackend:
    """A weight that bitsandbytes stores in 8 bits."""

    backend_name = "bnb 8bit"


# --- PEFT's properties and methods of a layer -----------------------------------------------------------------------


class _PeftLayer:
    """What PEFT's `BaseTunerLayer` and its wrappers of trained modules define, for one adapted layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    # An AttributeError means that the layer has no such name: the base is not wrapped in what has it.

    @property
    def base_layer(self) -> Any:
        """The base module without adapters: a module of the base's class that shares its parameters and buffers.

        Where adapters start as a part of the weight (PiSSA), its weight is a copy without that part, as in PEFT.
        """
        view = _without_adapters(self._layer)
        adapters = self._layer.adapters.items()
        starts = [m for a, m in adapters if "start_A" in m._buffers and a not in self._layer.merged_names]
        if starts and view.weight.is_floating_point() and not view.weight.is_meta:  # else quantized, or not loaded yet
            weight = get_dequantized_weight(view).detach()
            for module in starts:
                weight = add_low_rank_to_weight(weight, module.start_A, module.start_B, -module.scale)
            weight = weight.t() if is_weight_transposed(self._layer) else weight
            vars(view)["_parameters"] = {**view._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return view

    @property
    def in_features(self) -> int:
        """Inputs of the layer: channels of a convolution, rows of an embedding."""
        return (
            self._layer.in_channels
            if get_base_layer_type(self._layer) == "conv"
            else get_in_and_out_features(self._layer)[0]
        )

    @property
    def out_features(self) -> int:
        """Outputs of the layer: channels of a convolution, columns of an embedding."""
        return get_in_and_out_features(self._layer)[1]

    @property
    def original_module(self) -> nn.Module:
        """The base module, if an adapter trains a copy of it."""
        if not self._copies and not self._has_tokens:
            raise AttributeError("original_module")
        return _without_adapters(self._layer)

    @property
    def parameter_name(self) -> str:
        """Name of the parameter that the first adapter changes; it may change earlier parameters, too."""
        return next(m.parameter_name for m in self._layer.adapters.values() if m.adapted_parameters)

    @property
    def token_adapter(self) -> Any:
        """The layer itself, which has the trained tokens' tensors."""
        if not self._has_tokens:
            raise AttributeError("token_adapter")
        return self._layer

    @property
    def trainable_tokens_original(self) -> BufferDict:
        """The base's own rows of the trained tokens, by adapter."""
        modules = {a: m for a, m in self._layer.adapters.items() if "token_indices" in m.peft_values}
        if not modules:
            raise AttributeError("trainable_tokens_original")
        base: Any = _without_adapters(self._layer)
        vars(base)["_parameters"] = base._parameters | (self._layer.original_parameters or {})
        weight = get_dequantized_weight(base).detach()
        weight = weight.t() if get_base_layer_type(self._layer) == "embedding" else weight
        return BufferDict({a: weight[m.token_indices] for a, m in modules.items()})

    @property
    def is_feedforward(self) -> bool:
        """Whether an (IA)³ scales the layer's input, not its output."""
        return any(m.scales_input for m in self._layer.adapters.values())

    @property
    def quantization_backend(self) -> Bnb4bitBackend | Bnb8bitBackend | None:
        """How the base's weight is quantized, None if it is not."""
        if not is_quantized(self._layer):
            return None
        weight = self._layer._parameters.get("weight")  # experts have none
        return Bnb8bitBackend() if weight is not None and weight.dtype == torch.int8 else Bnb4bitBackend()

    def get_base_layer(self) -> Any:
        return self.base_layer

    def get_base_weight(self) -> Tensor:
        weight = get_dequantized_weight(self.base_layer).detach()
        return weight.t() if is_weight_transposed(self._layer) else weight.reshape(self.base_layer.weight.shape)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the dictionaries with trained tensors."""
        names = dict.fromkeys(
            name
            for module in self._layer.adapters.values()
            for name, child in [*module._parameters.items(), *module._modules.items()]
            if name not in _LAYER_NAMES  # LoRA of a second parameter is the `base_layer` of that of the first
            if child is not None and not (isinstance(child, nn.Module) and next(child.parameters(), None) is None)
        )
        return (*names, *(["modules_to_save"] if self._copies else []))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Names of the other dictionaries by adapter."""
        return tuple(dict.fromkeys(name for m in self._layer.adapters.values() for name in m.peft_values))

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; without an adapter of a method's own layers, of those that train the module."""
        active, available = list(self._layer.selection.active), self._available
        return active if self._layer.adapters and not self._has_tokens else [a for a in active if a in available]

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return not self._layer.selection.enabled

    @property
    def merged(self) -> bool:
        return self._layer.original_parameters is not None

    @property
    def merged_adapters(self) -> list[str]:
        return [a for a in self._layer.merged_names if a in self._available]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters on this layer alone, until the model's own `set_adapter` is called."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in self._available:
            self.set_requires_grad(adapter, adapter in names and not inference_mode)
        self._override(active=names)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters of this layer, and whether the active ones train."""
        for adapter in self._available:
            self.set_requires_grad(adapter, enabled and adapter in self._layer.selection.active)
        self._override(enabled=enabled)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Set whether these adapters' parameters on this layer train."""
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if adapter in self._layer.adapters:
                for parameter in self._layer.adapters[adapter].trainable_parameters():
                    parameter.requires_grad_(requires_grad)
            for layer in self._layers:
                if adapter in layer.trained_copies:
                    layer.trained_copies[adapter].requires_grad_(requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (None: the active ones) into this layer's parameters."""
        names = [n for n in adapter_names or self._layer.selection.active if n in self._available]
        for layer in self._layers:
            merge_adapters_into_layer(type(layer).__name__, layer, names, require_finite=safe_merge)

    def unmerge(self) -> None:
        """Put this layer's original parameters back."""
        for layer in self._layers:
            unmerge_adapters_from_layer(layer)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging an adapter would add to the weight of `base_layer`, in its shape."""
        module = self._layer.adapters[adapter]
        with torch.no_grad():
            if hasattr(module, "low_rank"):  # LoRA, for DoRA without the magnitude
                started = "start_A" in module._buffers
                A, B = (module.lora_A.weight, module.lora_B.weight) if started else module.low_rank()
                delta = (B @ A) * module.scale
            else:
                weight = get_dequantized_weight(self.base_layer).detach().double()
                delta = (module.merge_into(weight, None)[0] - weight).to(next(module.parameters()).dtype)
        return delta.t() if is_weight_transposed(self._layer) else delta.reshape(self.base_layer.weight.shape)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer alone."""
        for table in [self._layer.adapters, *(layer.trained_copies for layer in self._layers)]:
            table.pop(adapter_name) if adapter_name in table else None
        if adapter_name in (active := self._layer.selection.active):
            self._override(active=[a for a in active if a != adapter_name] or self._available[:1])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether a LoRA can approximate the adapter's change: it is a change of the weight."""
        module = self._layer.adapters[adapter_name]
        return module.base_can_store_merge and type(module).merge_into is not None

    # LoRA's scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its initial value."""
        if adapter in self._layer.adapters:
            module = self._layer.adapters[adapter]
            module.scale = scale * module.initial_scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for module in self._active_modules:
            module.scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None: restore the initial scaling."""
        for module in self._active_modules:
            module.scale = module.initial_scale if scale is None else module.scale / scale

    def _get_available_adapters(self) -> set[str]:
        return set(self._available)

    @property
    def _adapters(self) -> set[str]:
        return set(self._available)

    def _all_available_adapter_names(self) -> list[str]:
        return self._available

    @property
    def _active_modules(self) -> list[Any]:
        adapters = self._layer.adapters
        return [adapters[a] for a in self._layer.selection.active if a in adapters]

    @property
    def _available(self) -> list[str]:
        return sorted({*self._layer.adapters, *self._layer.trained_copies})

    @property
    def _copies(self) -> dict[str, nn.Module]:
        return get_fully_trained_copies(self._layer)

    @property
    def _layers(self) -> list[Any]:
        """The layer and, if it is trained in full, the layers inside it."""
        return [m for m in self._layer.modules() if isinstance(m, AdaptedLayerMixin)] if self._copies else [self._layer]

    @property
    def _has_tokens(self) -> bool:
        return any(m.method == "lora" and "token_indices" in m.peft_values for m in self._layer.adapters.values())

    def _override(self, **changes: Any) -> None:
        now, state = self._layer.selection, self._layer.active_state
        own = {"active": now.active, "enabled": now.enabled, **changes}
        for layer in self._layers:
            state.layers_with_own.append(layer)
            vars(layer)["selection"] = LayerAdapterOverride(state, **own)


_LAYER_NAMES = {name for name in vars(_PeftLayer) if not name.startswith("_")}
# Private names that scripts written for PEFT use.
_LAYER_NAMES |= {"_adapters", "_get_available_adapters", "_all_available_adapter_names"}


def get_fully_trained_copies(layer: Any) -> dict[str, nn.Module]:
    """Return the trained copies of all parameters of a layer (`modules_to_save`), by adapter; not those of a bias."""
    copies, own = layer.trained_copies.items(), set(layer._parameters)
    return {a: _without_adapters(layer, a) for a, c in copies if a not in layer.adapters and set(c._parameters) == own}


def _without_adapters(module: Any, adapter: str | None = None) -> Any:
    """Return a module of the base's class that shares everything with `module` but has no adapters.

    Its parameters and buffers, and those of its children, are the adapter's trained copies where it has any.
    """
    if not any(isinstance(m, AdaptedLayerMixin) for m in module.modules()):
        return module
    is_adapted = isinstance(module, AdaptedLayerMixin)
    view: Any = object.__new__(type(module).__bases__[1] if is_adapted else type(module))
    hidden = (*ADAPTED_ATTRIBUTES, "forward", "_old_forward", "_hf_hook")
    vars(view).update({name: value for name, value in vars(module).items() if name not in hidden})
    children = {n: m for n, m in module._modules.items() if not is_adapted or n not in ADDED_CHILDREN}
    vars(view)["_modules"] = {n: None if m is None else _without_adapters(m, adapter) for n, m in children.items()}
    if is_adapted and adapter in module.trained_copies:
        copies = module.trained_copies[adapter]
        vars(view)["_parameters"] = copies._parameters
        vars(view)["_buffers"] = module._buffers | copies._buffers
    return view


# --- classes for isinstance -----------------------------------------------------------------------------------------


class _LayerType(type):
    """Metaclass of PEFT's layer classes: adapted layers are their instances by what adapts them."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdaptedLayerMixin) and cls.accepts_as_instance(instance)  # type: ignore[attr-defined]

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{cls.__name__} is a class for isinstance: get_peft_model makes a model's layers such layers")


LORA_LIKE = ("adalora",)
"""Methods whose classes derive from LoRA's in PEFT."""


class BaseTunerLayer(metaclass=_LayerType):
    """A layer with an adapter module of any method."""

    methods: ClassVar[tuple[str, ...]] = ()
    """Names of the methods; empty: all."""
    base_type: ClassVar[Any] = nn.Module
    """Class of the base module, or a tuple of classes."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        """Return whether one of the layer's adapters makes it such a layer."""
        modules = [m for m in layer.adapters.values() if m.is_tuner_layer]
        return isinstance(layer, cls.base_type) and any(m.method in cls.methods or not cls.methods for m in modules)


class LoraLayer(BaseTunerLayer):
    """A layer with a LoRA or AdaLoRA."""

    methods: ClassVar[tuple[str, ...]] = ("lora", *LORA_LIKE)

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        """Return whether one of the adapters is a LoRA; trained tokens do not count as one."""
        names = ("lora_A", "lora_embedding_A")
        return super().accepts_as_instance(layer) and any(hasattr(m, n) for m in layer.adapters.values() for n in names)


class ParamWrapper(LoraLayer):
    """A module with a LoRA on one or more of its parameters (`target_parameters`)."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        return any(m.adapted_parameters for m in layer.adapters.values() if m.method == "lora")


class LycorisLayer(BaseTunerLayer):
    """A layer with a LoHa or LoKr."""

    methods: ClassVar[tuple[str, ...]] = ("loha", "lokr")


class TrainableTokensLayer(BaseTunerLayer):
    """An embedding or output head with trained tokens."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        return any("token_indices" in m.peft_values for m in layer.adapters.values())


def _make_layer_types() -> dict[str, Any]:
    """Return the class `XLayer` of each method that PEFT has and that changes layers, by its name."""
    made: dict[str, Any] = {"LoraLayer": LoraLayer, "TrainableTokensLayer": TrainableTokensLayer}
    for method, stem in map_peft_class_prefixes_by_method().items():
        base = LoraLayer if method in LORA_LIKE else LycorisLayer if method in LycorisLayer.methods else BaseTunerLayer
        body = {
            "methods": (method,),
            "__module__": __name__,
            "__doc__": f"Class of the layers with an adapter of the method {method}.",
        }
        made.setdefault(f"{stem}Layer", _LayerType(f"{stem}Layer", (base,), body))
    return made


globals().update(_make_layer_types())


class ModulesToSaveWrapper(metaclass=_LayerType):
    """A module that an adapter trains in full."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        return bool(get_fully_trained_copies(layer))


class TrainableTokensWrapper(metaclass=_LayerType):
    """An embedding or output head with trained tokens beside a LoRA."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        return _PeftLayer(layer)._has_tokens


class AuxiliaryTrainingWrapper(metaclass=_LayerType):
    """A module that an adapter trains in full or in some rows, beside its method."""

    @classmethod
    def accepts_as_instance(cls, layer: Any) -> bool:
        return ModulesToSaveWrapper.accepts_as_instance(layer) or TrainableTokensWrapper.accepts_as_instance(layer)


@cache
def get_peft_layer_class(method: Any, base_type: type) -> Any:
    """Return the class of a method's layers of one type, such as PEFT's `lora.Linear`."""
    bases: Any = (base_type, Conv1D) if base_type is nn.Linear else base_type
    body = {"base_type": bases, "__doc__": f"An adapted {base_type.__name__}: {method.__doc__}"}
    return _LayerType(base_type.__name__, (method,), body)
