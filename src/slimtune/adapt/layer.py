"""The ONE adapted layer: a module of the base, adapted where it stands.

Attaching changes a module's class, not the module: `q_proj` stays the same object with the same parameters under the
same names, its class becomes a subclass of the old one whose forward adds the active deltas. (torch does the same in
`parametrize` and FSDP2.) Detaching gives the class back. So tied heads, `module.weight`, checkpoints of the base and
`isinstance(q_proj, nn.Linear)` go on working.

Beside its parameters an adapted module holds, by adapter name:
    `adapters.<name>`   a method's delta
    `owned.<name>`      the adapter's own copy of some of the module's parameters (a new head, a trained bias)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..methods.contract import Delta, MergeRefused, Site


def kind_of(module: nn.Module) -> Literal["linear", "embedding"] | None:
    """Return `"linear"` or `"embedding"` where a delta can be added to `module`, else None."""
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else None


def transposed(module: nn.Module) -> bool:
    """Return whether the module keeps its weight as `(in, out)`, as Conv1D and Embedding do."""
    return isinstance(module, Conv1D | nn.Embedding)


def site_of(name: str, module: nn.Module, *, autocast: bool = True) -> Site:
    """Return the site a delta is built for; its parameters are fp32 above a 16-bit base unless `autocast` is off."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear):  # a quantized weight's shape says nothing
        out_features, in_features = module.out_features, module.in_features
    else:
        in_features, out_features = weight.shape
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    if autocast and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    kind = kind_of(module)
    assert kind == "linear" or kind == "embedding"
    # An offloaded weight lies on meta until its hook brings it to where it is computed.
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if weight.is_meta and hook is not None else None
    device = weight.device if device is None else torch.device(device)
    return Site(name, kind, in_features, out_features, device, dtype)


class Adapted(nn.Module):
    """Mixed into the class of an adapted module; see the top of this file."""

    adapters: nn.ModuleDict
    owned: nn.ModuleDict
    _active: tuple[str, ...]
    """Adapters whose delta is applied, by name: a replica of the module has objects of its own."""
    _owner: str | None
    """The adapter whose copies stand for the module's parameters."""
    _kept: dict[str, nn.Parameter] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module, then each active delta: `(..., in)` to `(..., out)`."""
        y = super().forward(*args, **kwargs)
        if not self._active:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return self._changed(x, y)
        # A scaled embedding gives `scale · W[x]`; a delta changes W.
        rows = torch.nn.functional.embedding(x, self.weight)  # type: ignore[arg-type]
        return y + (self._changed(x, rows) - rows) * scale

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a merge put by must follow the model to another device or dtype.
        for parameter in (self._kept or {}).values():
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)

    def _changed(self, x: Tensor, y: Tensor) -> Tensor:
        for name in self._active:
            y = self.adapters[name](x, y)
        return y


def adapt(module: nn.Module) -> Adapted:
    """Make `module` adapted, in place; one that is adapted already is returned as it is."""
    if not isinstance(module, Adapted):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise TargetError(
                f"the forward of a {type(module).__name__} was replaced on the object, so that an adapter there would "
                "never be called",
                "a module with its own class's forward",
                "attach the adapter before the forward is replaced",
            )
        base: Any = type(module)
        _become(module, _adapted_class(base, tuple(module._parameters)))
        module.adapters, module.owned = nn.ModuleDict(), nn.ModuleDict()
        _note(module, _active=(), _owner=None, _kept=None)
    assert isinstance(module, Adapted)
    return module


def restore(module: Adapted) -> None:
    """Give `module` its own class back and drop every adapter; a merge that was made stays."""
    del module.adapters, module.owned
    for name in ("_active", "_owner", "_kept"):
        del module.__dict__[name]
    _become(module, type(module).__bases__[1])


def add_delta(module: nn.Module, adapter: str, delta: Delta) -> None:
    """Put a delta beside `module` under an adapter's name; inactive until `activate`."""
    adapt(module).adapters[adapter] = delta


def own(module: nn.Module, adapter: str, names: Iterable[str], *, autocast: bool = True) -> None:
    """Give an adapter its own trainable copy of the module's parameters `names`; inactive until `activate`."""
    copies = nn.Module()
    for name in names:
        kept = getattr(module, "_kept", None) or {}
        base = kept.get(name, module._parameters[name])
        assert base is not None
        half = base.dtype in (torch.float16, torch.bfloat16)
        wide = torch.float32 if autocast and half else base.dtype
        copies.register_parameter(name, nn.Parameter(base.detach().to(wide, copy=True)))
    adapt(module).owned[adapter] = copies


def activate(module: Adapted, names: Iterable[str]) -> None:
    """Make the deltas and copies of these adapters, in this order, the ones the module runs with."""
    names = list(names)
    owner = next((n for n in names if n in module.owned), None)
    _note(module, _active=tuple(n for n in names if n in module.adapters), _owner=owner)


def remove(module: Adapted, adapter: str) -> None:
    """Drop one adapter; the last one gives the module its own class back."""
    for table in (module.adapters, module.owned):
        if adapter in table:
            del table[adapter]
    if not module.adapters and not module.owned:
        restore(module)


def merge(name: str, module: Adapted, *, check: bool = False) -> None:
    """Fold what is active into the module's own parameters; the originals are kept, object for object, for `unmerge`.

    Raises:
        MergeRefused: a method cannot be merged, the base is quantized, or (with `check`) the result is not finite.
    """
    if module._kept is not None:
        return
    merged: dict[str, Tensor] = {}
    for n, p in module.owned[module._owner].named_parameters() if module._owner else ():
        merged[n] = p.detach().to(module._parameters[n].dtype, copy=True)  # type: ignore[union-attr]
    if module._active:
        weight = merged.get("weight", module._parameters["weight"])
        if weight is None or not weight.dtype.is_floating_point:
            raise MergeRefused(
                f"{name} is quantized ({getattr(weight, 'dtype', None)}): load the base in 16 or 32 bits"
            )
        weight = weight.t() if transposed(module) else weight
        with torch.no_grad():
            for adapter in module._active:
                weight = module.adapters[adapter].merged(weight)  # type: ignore[operator]
        merged["weight"] = weight.t().contiguous() if transposed(module) else weight
    for n, tensor in merged.items():
        if check and not torch.isfinite(tensor).all():
            raise MergeRefused(f"{name}.{n} is not finite after merging: the adapter holds NaN or infinity")
    kept = {n: module._parameters[n] for n in merged}
    for n, tensor in merged.items():
        # A new parameter object, so that a module tied to this one keeps what it had.
        module._parameters[n] = nn.Parameter(tensor, requires_grad=False)
    _note(module, _kept=kept, _active=(), _owner=None)


def unmerge(module: Adapted) -> None:
    """Put the original parameters back, bit for bit."""
    if module._kept is not None:
        module._parameters.update(module._kept)
        _note(module, _kept=None)


def is_merged(module: Adapted) -> bool:
    """Return whether the module's parameters hold a merge."""
    return module._kept is not None


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):
        # accelerate's hooks (device_map, offload) call what they found there; let them find the new class's.
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


def _note(module: nn.Module, **values: Any) -> None:
    # Past nn.Module's __setattr__, which would register the deltas a second time.
    module.__dict__.update(values)


@cache
def _adapted_class(base: Any, parameters: tuple[str, ...]) -> type[Adapted]:
    def own_or_base(name: str) -> property:
        set_plainly = f"_plain_{name}"

        def get(self: Adapted) -> Any:
            if name in self._parameters:
                plain = self._parameters[name]
            elif set_plainly in vars(self):
                plain = vars(self)[set_plainly]
            else:
                raise AttributeError(f"{base.__name__!r} has no {name!r}")
            mine = getattr(self.owned[self._owner], name, None) if self._owner else None
            # The module computes in the dtype of its base whatever the copy is kept in.
            return plain if mine is None or plain is None else mine.to(plain.dtype)

        def put(self: Adapted, value: Any) -> None:
            # DataParallel and FSDP set plain tensors in place of parameters.
            self.__dict__[set_plainly] = value

        return property(get, put)

    body: dict[str, Any] = {n: own_or_base(n) for n in parameters}
    # The base's name: transformers and people read it.
    return type(base.__name__, (Adapted, base), {**body, "__module__": base.__module__, "__doc__": base.__doc__})
