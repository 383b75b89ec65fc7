"""The adapted layer: one class for every kind of base module and every method.

**Class swap.** Attaching an adapter changes the class of a module, not the module. `q_proj` stays the same object with
the same parameters under the same names; its class becomes a subclass of its old class, created here, whose forward
runs the active adapter modules around the old forward. (PyTorch does the same in `parametrize` and FSDP2.) Removing
the last adapter sets the old class again. Therefore tied heads, references to `q_proj`, `q_proj.weight`, checkpoints of
the base and `isinstance(q_proj, nn.Linear)` keep working, and the base comes back bit for bit.

In addition to its own parameters, an adapted module contains, by adapter name:

    `adapters.<name>`          the method's adapter module
    `modules_to_save.<name>`   the adapter's own copy of some of the module's parameters (also of biases)

The subclass turns each parameter (`weight`, `bias`) and stored buffer into a property: it returns the active adapter's
trained copy if there is one, else the base's own. A weight that PyTorch reads without calling the module (those of
nn.MultiheadAttention) contains the updates of the active adapters. All adapted modules of a model share one
`ActiveAdapters`, so switching adapters costs the same no matter how many are loaded.

A name that neither the module nor its class has is PEFT's: the compat hook resolves it (`extension_hooks.py`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MixedBatchError, TargetError, UnsupportedTargetError
from ..kernels.linear_layers import (
    ReadWeight,
    get_base_layer_type,
    get_in_and_out_features,
    get_weight_and_bias_names,
    list_persistent_buffer_names,
)
from .active_adapters import ActiveAdapters, LayerAdapterOverride
from .adapter_module import WEIGHT_KINDS, AdapterSite, BaseForward, SiteKind
from .architectures import get_text_config
from .extension_hooks import PeftNameLookupMixin, load_compat_hook
from .generated_classes import PickledByClassFactory

ADAPTED_ATTRIBUTES = ("active_state", "selection", "original_parameters", "merged_names", "current_copy_adapter_name")
"""What an adapted module has in addition to its base's attributes."""
ADDED_CHILDREN = ("adapters", "modules_to_save")
"""Its children, by adapter: adapter modules, and trained copies of the base's parameters."""
_NO_COPIES = nn.ModuleDict()
"""The trained copies of a layer without any; nothing is added to it."""


def read_adapter_site(
    name: str, kind: SiteKind, model: nn.Module, *, autocast: bool = True, skip_init: bool = False
) -> AdapterSite:
    """Return the site of a module. With `autocast`, adapter parameters are fp32 above a 16-bit base."""
    module = model.get_submodule(name)
    if get_base_layer_type(module) is not None and kind in {*WEIGHT_KINDS, "norm"}:
        in_features, out_features = get_in_and_out_features(module)
        weight: Any = module._parameters[get_weight_and_bias_names(module)[0]]
    else:
        in_features = out_features = getattr(get_text_config(model), "hidden_size", 0)
        weight = next((p for p in module.parameters() if p.dtype.is_floating_point), next(model.parameters()))
    dtype = _trained_dtype(weight.dtype if weight.dtype.is_floating_point else torch.float32, autocast)
    # accelerate keeps an offloaded weight on meta until its hook moves it to the execution device.
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if weight.is_meta and hook is not None else None
    device = weight.device if device is None else torch.device(device)
    skip_init = skip_init or device.type == "meta"  # meta tensors have no values to initialise from
    return AdapterSite(name, kind, in_features, out_features, device, dtype, module, model, skip_init)


class AdaptedLayerMixin(PickledByClassFactory, PeftNameLookupMixin):
    """Mixed into the class of an adapted module; see the top of this file."""

    adapters: nn.ModuleDict
    active_state: ActiveAdapters
    """What all adapted layers of the model share."""
    selection: ActiveAdapters | LayerAdapterOverride
    """The layer's active adapters: `active_state`, unless others were chosen for this layer."""
    original_parameters: dict[str, nn.Parameter | None] | None
    """The base's parameters (and buffers) that a merge replaced; None if nothing is merged."""
    merged_names: tuple[str, ...]
    """The adapters that are merged."""
    current_copy_adapter_name: str | None
    """Adapter whose trained copies are in use while the rows of a mixed batch run one adapter at a time."""

    @property
    def trained_copies(self) -> nn.ModuleDict:
        """The copies by adapter; as a child they have PEFT's name, which scripts look for in names of parameters."""
        return self._modules.get("modules_to_save", _NO_COPIES)  # type: ignore[return-value]

    def run_adapted(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the base module's forward `base` with the active adapter modules around it."""
        active = self.active_state
        if self.original_parameters is not None or not (self.selection.names or active.layer_runner):
            return base(*args, **kwargs)
        if get_base_layer_type(self) == "weight":
            return base(*args, **kwargs)  # its weight contains the update: see `_make_parameter_property`
        if get_base_layer_type(self) is not None and not args:
            args = (kwargs.pop(next(iter(kwargs))),)
        if active.layer_runner is not None:
            return active.layer_runner.run_layer(self, base, args, kwargs)
        adapters: Any = self._modules["adapters"]
        names = [n for n in self.selection.names if n in adapters]
        modules: list[Any] = [adapters[n] for n in names]
        if not modules:
            return base(*args, **kwargs)

        def nest(run: Any) -> Any:
            for i, (name, module) in enumerate(zip(names, modules, strict=True)):
                tokens = self.find_changed_tokens(name, module, args)
                run = partial(module.forward_with_base, BaseForward(self, run, modules[:i]), **tokens)
            return run

        return self.run_nested(nest, base, args, kwargs)

    def run_nested(self, nest: Callable[[Any], Any], base: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run nested adapter modules; for an embedding that returns `scale · W[x]` they see the unscaled `W[x]`."""
        module: Any = self
        scale = getattr(self, "embed_scale", None) if isinstance(self, nn.Embedding) else None
        if scale is None:
            return nest(base)(*args, **kwargs)
        rows = nn.functional.embedding(args[0], module.weight)
        adapted = nest(lambda x: nn.functional.embedding(x, module.weight))(*args)
        return base(*args, **kwargs) + (adapted - rows) * scale

    def find_changed_tokens(self, adapter: str, module: Any, args: tuple) -> dict[str, Tensor]:
        """Return the further argument of an adapter module that changes some tokens only: their indices."""
        if not module.takes_tokens:
            return {}
        return {"tokens": self.active_state.get_token_indices(adapter, args[0], module.site_name)}

    @contextmanager
    def use_copies(self, adapter: str | None) -> Iterator[None]:
        """Inside the `with`, the module's parameters are this adapter's trained copies, where it has any."""
        before, self.__dict__["current_copy_adapter_name"] = self.current_copy_adapter_name, adapter
        try:
            yield
        finally:
            self.__dict__["current_copy_adapter_name"] = before

    def __repr__(self) -> str:
        return load_compat_hook().format_layer_like_peft(self, super().__repr__())

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            message = f"the parameter {name} of an adapted {type(self).__name__} cannot be deleted, as FSDP1 does"
            hint = "torch.distributed.fsdp.fully_shard (FSDP2) shards an adapted model"
            raise UnsupportedTargetError(message, "a layer that keeps its parameters", hint)
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Parameters that a merge replaced must follow the model to another device or dtype.
        self.active_state.caches.clear()
        for parameter in (self.original_parameters or {}).values():
            if parameter is not None:
                parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


# --- adding and removing adapters -----------------------------------------------------------------------------------


def swap_to_adapted_class(module: nn.Module, active: ActiveAdapters, method: str) -> AdaptedLayerMixin:
    """Swap the class of `module` for its adapted subclass; an adapted module is returned unchanged.

    As in PEFT, layers that different methods adapt first have different classes.
    """
    if isinstance(module, AdaptedLayerMixin):
        return module
    base: Any = type(module)
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        message = f"the forward of a {base.__name__} was replaced on the object, so an adapter would never be called"
        raise TargetError(message, hint="attach the adapter before the forward is replaced")
    if not can_hold_adapter_children(module):
        message = f"a {base.__name__} cannot be adapted: it already has children where the adapters would go"
        raise TargetError(message, hint="name the modules inside it")
    names = (*module._parameters, *list_persistent_buffer_names(module))
    _set_class(module, _make_adapted_class(base, names, "config" in vars(module), method))
    assert isinstance(module, AdaptedLayerMixin)
    module._modules["adapters"] = nn.ModuleDict()
    # Bypasses nn.Module.__setattr__, which would register parameters.
    module.__dict__.update(
        active_state=active, selection=active, original_parameters=None, merged_names=(), current_copy_adapter_name=None
    )
    return module


def can_hold_adapter_children(module: nn.Module) -> bool:
    """Return whether a module can have the children of an adapted module: a list of modules runs all it has."""
    has_children = hasattr(type(module), "adapters") or {*ADDED_CHILDREN} & {*vars(module), *module._modules}
    is_list = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return isinstance(module, AdaptedLayerMixin) or not (is_list or has_children)


def restore_base_class(module: AdaptedLayerMixin) -> None:
    """Set the module's own class again and drop all adapters; merged weights stay merged."""
    for name in ADDED_CHILDREN:
        module._modules.pop(name, None)
    for name in (*ADAPTED_ATTRIBUTES, "_prefix_config"):
        module.__dict__.pop(name, None)
    _set_class(module, type(module).__bases__[1])


def copy_parameters_to_adapter(
    module: AdaptedLayerMixin, adapter: str, names: Iterable[str], autocast: bool, tied: dict[int, nn.Parameter] | None
) -> None:
    """Give an adapter its own copy of the module's parameters and buffers `names`; parameters are trainable.

    With `autocast`, copies of 16-bit parameters are fp32. `tied` holds the adapter's copies so far, by `id` of the
    base's parameter: parameters that are tied in the base share one. None: each copy is separate.
    """
    copies = nn.Module()
    copies._parameters.update({n: None for n, p in module._parameters.items() if p is None})
    for name in names:
        own = module._buffers if name in module._buffers else module._parameters
        base = (module.original_parameters or {}).get(name, own[name])
        assert base is not None
        if own is module._buffers:
            copies.register_buffer(name, base.detach().clone())
            continue
        if base.is_meta and getattr(module, "_hf_hook", None) is not None:
            message = f"the {name} of a {type(module).__name__} is offloaded, so it cannot be copied for training"
            raise TargetError(message, hint="leave it out of modules_to_save, or keep it on a device in the device_map")
        copy = None if tied is None else tied.get(id(base))
        if copy is None:
            copy = nn.Parameter(base.detach().to(_trained_dtype(base.dtype, autocast), copy=True))
        if tied is not None:
            tied[id(base)] = copy
        copies.register_parameter(name, copy)
    # Not set as an attribute: a whole model has PeftModel's `modules_to_save`.
    table: Any = module._modules.setdefault("modules_to_save", nn.ModuleDict())
    table[adapter] = copies


def remove_adapter_from_layer(module: AdaptedLayerMixin, adapter_name: str) -> None:
    """Drop one adapter; without any adapter left, the module gets its own class back."""
    for table in (module.adapters, module.trained_copies):
        if adapter_name in table:
            del table[adapter_name]
    if not module.adapters and not module.trained_copies:
        restore_base_class(module)


# --- the adapted class ----------------------------------------------------------------------------------------------


def _trained_dtype(dtype: torch.dtype, autocast: bool) -> torch.dtype:
    return torch.float32 if autocast and dtype in (torch.float16, torch.bfloat16) else dtype


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):
        # accelerate's hooks (device_map, offload) saved the bound forward of the old class.
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


@cache
def _make_adapted_class(
    base: Any, parameters: tuple[str, ...], has_config: bool, method: str
) -> type[AdaptedLayerMixin]:
    """Return the adapted subclass of `base`; it has the name and the forward signature of `base`."""

    # transformers reads the signature to find out which dataset columns a model takes.
    @wraps(base.forward)
    def forward(self: AdaptedLayerMixin, *args: Any, **kwargs: Any) -> Any:
        if "active_state" not in vars(self):  # a hook kept this forward after the adapters were removed
            return base.forward(self, *args, **kwargs)
        return self.run_adapted(partial(base.forward, self), *args, **kwargs)

    def get_config(self: AdaptedLayerMixin) -> Any:
        adapters: Any = self.adapters.values()
        for module in adapters:
            if (config := module.make_base_config(self)) is not None:
                return config
        return vars(self)["config"]

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    body: dict[str, Any] = {n: _make_parameter_property(base, n) for n in parameters}
    if has_config:
        body["config"] = property(get_config, lambda self, value: vars(self).update(config=value))
    body |= {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    body["_factory_call"] = (_make_adapted_class, base, parameters, has_config, method)
    return type(base.__name__, (AdaptedLayerMixin, base), body)


def _merge_active(layer: AdaptedLayerMixin, weight: Tensor) -> Tensor:
    """Return a weight that is read without a call of the module, with the updates of the active adapters."""
    active, adapters = layer.active_state, layer.adapters
    if any(name in adapters for name in active.row_adapters or ()):
        message = "an nn.MultiheadAttention cannot run a mixed batch, since its weight is read without a call"
        raise MixedBatchError(message, hint="set_adapter, and batches that use one adapter")
    names = layer.selection.names if active.row_adapters is None else []
    modules: list[Any] = [adapters[n] for n in names if n in adapters]
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) if modules else weight
    for module in modules:
        merged, _ = module.merge_into(merged, None)
    return merged.to(weight.dtype)


def _make_parameter_property(base: type, name: str) -> property:
    plain_tensor = f"_plain_{name}"
    is_read = issubclass(base, ReadWeight) and name in ("in_proj_weight", "weight")

    def get_value(self: AdaptedLayerMixin) -> Any:
        if name in self._parameters:
            own: Any = self._parameters[name]
        elif name in self._buffers:
            own = self._buffers[name]
        elif plain_tensor in vars(self):
            own = vars(self)[plain_tensor]
        else:
            raise AttributeError(f"{base.__name__!r} object has no attribute {name!r}")
        if self.original_parameters is not None or own is None:
            return own
        value = own
        if self.trained_copies:
            adapter: Any = self.current_copy_adapter_name
            if adapter is None and self.active_state.row_adapters is None:
                adapter = next((n for n in self.selection.names if n in self.trained_copies), None)
            copy = getattr(self.trained_copies[adapter], name, None) if adapter in self.trained_copies else None
            # The module computes in the base's dtype, whatever the dtype of the copy.
            value = own if copy is None else copy.to(own.dtype)
        return _merge_active(self, value) if is_read else value

    def set_value(self: AdaptedLayerMixin, value: Any) -> None:
        # DataParallel replaces parameters by plain tensors.
        self.__dict__[plain_tensor] = value

    return property(get_value, set_value)
