"""The ONE adapted layer: a module of the base, adapted where it stands.

Attaching changes a module's class, not the module: `q_proj` stays the same object with the same parameters under the
same names, its class becomes a subclass of the old one whose forward runs the active deltas around the old forward.
(torch does the same in `parametrize` and FSDP2.) Detaching gives the class back. So tied heads, `module.weight`,
checkpoints of the base and `isinstance(q_proj, nn.Linear)` go on working.

Beside its parameters an adapted module holds, by adapter name:
    `adapters.<name>`   a method's delta
    `trained_copies.<name>`      the adapter's own copy of some of the module's parameters (a new head, a trained bias)
and, shared by every adapted module of a model, one `Running`: which adapters run. So changing it costs the same
whatever is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.prefix import make_prefix_config_view
from ..errors import TargetError
from ..kernels.batched_lora import add_low_rank_rows
from ..utils.linear_layers import is_quantized, is_transposed, layer_kind, layer_sizes
from .architectures import text_config
from .base import BaseForward, MergeUnsupported, Site, SiteKind
from .mixed_batch import ActiveAdapters


def get_site(name: str, kind: SiteKind, model: nn.Module, *, autocast: bool = True, loading: bool = False) -> Site:
    """Return the site a delta is built for; its parameters are fp32 above a 16-bit base unless `autocast` is off."""
    module = model.get_submodule(name)
    if layer_kind(module) is not None and kind in ("linear", "embedding", "norm"):
        in_features, out_features = layer_sizes(module)
        weight: Any = module._parameters["weight"]
    else:
        in_features = out_features = getattr(text_config(model), "hidden_size", 0)
        weight = next((p for p in module.parameters() if p.dtype.is_floating_point), next(model.parameters()))
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    if autocast and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    # An offloaded weight lies on meta until its hook brings it to where it is computed.
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if weight.is_meta and hook is not None else None
    device = weight.device if device is None else torch.device(device)
    loading = loading or device.type == "meta"  # there is nothing to start from
    return Site(name, kind, in_features, out_features, device, dtype, module, model, loading)


class AdaptedLayer(nn.Module):
    """Mixed into the class of an adapted module; see the top of this file."""

    adapters: nn.ModuleDict
    trained_copies: nn.ModuleDict
    _running: ActiveAdapters
    _kept: dict[str, nn.Parameter | None] | None
    current_copy: str | None
    """Set while rows are run apart: the adapter whose copies stand for the module's parameters."""

    def _run(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the base's forward with the active deltas around it."""
        running = self._running
        if self._kept is not None or not (running.active or running.rows):
            return base(*args, **kwargs)
        kind = layer_kind(self)
        if kind is not None and not args:
            args = (kwargs.pop(next(iter(kwargs))),)
        if running.rows is not None:
            return self._run_rows(base, args, kwargs)
        deltas = [self.adapters[n] for n in running.active if n in self.adapters]
        if not deltas:
            return base(*args, **kwargs)
        return _unscaled(self, base, lambda run: _nest(self, run, deltas), args, kwargs)

    def _run_rows(self, base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        first: Tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        kept = self._running.kept(self, first)
        if kept is not None:
            return add_low_rank_rows(base(*args, **kwargs), first, *kept)
        masks = self._running.masks(first.shape[0], first.device)
        mine = [n for n in masks if n in self.adapters]
        owners = [n for n in masks if n in self.trained_copies]
        plain = base
        if owners:
            base = self._owned_rows(base, {n: masks[n] for n in owners})
        if not mine:
            return base(*args, **kwargs)
        deltas: dict[str, Any] = {n: self.adapters[n] for n in mine}
        if layer_kind(self) == "linear" and not owners and not any(map(_drops, deltas.values())):
            factors = {n: d.low_rank_factors() for n, d in deltas.items()}
            if all(f is not None for f in factors.values()):
                return add_low_rank_rows(base(*args, **kwargs), first, *self._running.stack(self, first, factors))

        def nest(run: Callable[..., Any]) -> Callable[..., Any]:
            alone = BaseForward(self, plain if run is base else run)
            for name, delta in deltas.items():
                run = functools.partial(self._in_rows, name, delta, BaseForward(self, run), alone, masks[name])
            return run

        return _unscaled(self, base, nest, args, kwargs)

    def _in_rows(
        self, name: str, delta: Any, frozen: BaseForward, alone: BaseForward, rows: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Run one adapter's delta on its rows, its own copies of parameters standing for the module's."""
        if name not in self.trained_copies:
            return delta.forward_batch_rows(frozen, alone, rows, *args, **kw)
        y = frozen(*args, **kw)
        with _set(self, current_copy=name):
            mine = delta.forward_with_base(alone, *(a[rows] for a in args), **kw)
        return y.index_put((rows,), mine.to(y.dtype))

    def _owned_rows(self, base: Callable[..., Any], masks: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the base's forward with each row run by its own adapter's copies of the parameters."""

        def run(x: Tensor, **kwargs: Any) -> Tensor:
            y = base(x, **kwargs)
            for name, rows in masks.items():
                with _set(self, current_copy=name):
                    y = y.index_put((rows,), base(x[rows], **kwargs))
            return y

        return run

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a merge put by must follow the model to another device or dtype.
        self._running.forget()
        for parameter in (self._kept or {}).values():
            if parameter is not None:
                parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


def make_adapted(module: nn.Module, running: ActiveAdapters) -> AdaptedLayer:
    """Make `module` adapted, in place; one that is adapted already is returned as it is."""
    if not isinstance(module, AdaptedLayer):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise TargetError(
                f"the forward of a {type(module).__name__} was replaced on the object, so that an adapter there would "
                "never be called",
                "a module with its own class's forward",
                "attach the adapter before the forward is replaced",
            )
        base: Any = type(module)
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or hasattr(module, "adapters"):
            raise TargetError(
                f"a {base.__name__} keeps children of its own where adapters would be put",
                "a module that is no container and has no `adapters`",
                "name the modules inside it",
            )
        _become(module, _adapted_class(base, tuple(module._parameters), "config" in vars(module)))
        module.adapters, module.trained_copies = nn.ModuleDict(), nn.ModuleDict()
        # Past nn.Module's __setattr__, which would register some of these.
        module.__dict__.update(_running=running, _kept=None, current_copy=None)
    assert isinstance(module, AdaptedLayer)
    return module


def restore(module: AdaptedLayer) -> None:
    """Give `module` its own class back and drop every adapter; a merge that was made stays."""
    del module.adapters, module.trained_copies
    for name in ("_running", "_kept", "current_copy", "_view"):
        module.__dict__.pop(name, None)
    _become(module, type(module).__bases__[1])


def own(
    module: AdaptedLayer,
    adapter: str,
    names: Iterable[str],
    *,
    autocast: bool = True,
    tied: dict[int, nn.Parameter] | None = None,
) -> None:
    """Give an adapter its own trainable copy of the module's parameters `names`.

    Args:
        module: the adapted module.
        adapter: name of the adapter.
        names: names of the parameters.
        autocast: copies of 16-bit parameters are fp32.
        tied: the adapter's copies so far, by `id` of the base's parameter, which parameters tied in the base share;
            None: each copy is separate.
    """
    copies = nn.Module()
    for name in names:
        base = (module._kept or {}).get(name, module._parameters[name])
        assert base is not None
        if base.is_meta and getattr(module, "_hf_hook", None) is not None:
            raise TargetError(
                f"the {name} of a {type(module).__name__} is offloaded, and cannot be copied to be trained whole",
                "a module that lies in memory",
                "leave it out of modules_to_save, or keep it on a device in the device_map",
            )
        half = base.dtype in (torch.float16, torch.bfloat16)
        wide = torch.float32 if autocast and half else base.dtype
        copy = None if tied is None else tied.get(id(base))
        if copy is None:
            copy = nn.Parameter(base.detach().to(wide, copy=True))
        if tied is not None:
            tied[id(base)] = copy
        copies.register_parameter(name, copy)
    module.trained_copies[adapter] = copies


def remove(module: AdaptedLayer, adapter: str) -> None:
    """Drop one adapter; the last one gives the module its own class back."""
    for table in (module.adapters, module.trained_copies):
        if adapter in table:
            del table[adapter]
    if not module.adapters and not module.trained_copies:
        restore(module)


def rename(module: AdaptedLayer, old: str, new: str) -> None:
    """Give an adapter another name."""
    for table in (module.adapters, module.trained_copies):
        if old in table:
            table[new] = table[old]
            del table[old]


def merge(name: str, module: AdaptedLayer, adapters: Iterable[str], *, check: bool = False) -> None:
    """Fold adapters into the module's own parameters; the originals are kept, object for object, for `unmerge`.

    Raises:
        MergeRefused: a method cannot be merged, the base is quantized, or (with `check`) the result is not finite.
    """
    if module._kept is not None:
        return
    merged: dict[str, Tensor] = {}
    owner = next((a for a in adapters if a in module.trained_copies), None)
    for n, p in module.trained_copies[owner].named_parameters() if owner else ():
        merged[n] = p.detach()
    deltas: list[Any] = [module.adapters[a] for a in adapters if a in module.adapters]
    if deltas:
        merged |= _merged(name, module, deltas, merged)
    kept = {n: module._parameters[n] for n in merged}
    for n, tensor in merged.items():
        like = kept[n] if kept[n] is not None else module._parameters["weight"]
        if check and not torch.isfinite(tensor).all():
            raise MergeUnsupported(f"{name}.{n} is not finite after merging: the adapter holds NaN or infinity")
        if kept[n] is None:
            raise MergeUnsupported(f"{name} has no bias in the base to merge one into")
        # A new parameter object, so that a module tied to this one keeps what it had.
        assert like is not None
        module._parameters[n] = nn.Parameter(tensor.to(like.dtype, copy=True), requires_grad=False)
    module.__dict__["_kept"] = kept


def unmerge(module: AdaptedLayer) -> None:
    """Put the original parameters back, bit for bit."""
    if module._kept is not None:
        module._parameters.update(module._kept)
        module.__dict__["_kept"] = None


def _merged(name: str, module: AdaptedLayer, deltas: list[Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that deltas change, with what they are after."""
    if is_quantized(module):
        raise MergeUnsupported(f"{name} is quantized: load the base in 16 or 32 bits")
    before = {n: given.get(n, module._parameters.get(n)) for n in ("weight", "bias")}
    weight, bias = before["weight"], before["bias"]
    if weight is not None:
        # fp32 at least, rounded once at the end.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.detach().to(wide), None if bias is None else bias.detach().to(wide)
        weight = weight.t() if is_transposed(module) else weight
    start = weight, bias
    with torch.no_grad():
        for delta in deltas:
            weight, bias = delta.merge_into(weight, bias)
    changed: dict[str, Tensor] = {}
    if weight is not start[0] and weight is not None:
        changed["weight"] = weight.t().contiguous() if is_transposed(module) else weight
    if bias is not start[1] and bias is not None:
        changed["bias"] = bias
    return changed


def _get_attention_config(module: AdaptedLayer) -> Any:
    if any(m.uses_attention_prefix for m in module.adapters.values()):
        return make_prefix_config_view(module)
    return vars(module)["config"]


def _nest(module: AdaptedLayer, run: Callable[..., Any], deltas: list[Any]) -> Callable[..., Any]:
    for at, delta in enumerate(deltas):
        run = functools.partial(delta.forward_with_base, BaseForward(module, run, deltas[:at]))
    return run


def _drops(delta: nn.Module) -> bool:
    """Return whether a delta drops inputs by chance at this moment: then it is no plain low-rank map."""
    return delta.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in delta.modules())


def _unscaled(module: Any, base: Any, nest: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    if scale is None:
        return nest(base)(*args, **kwargs)
    # A scaled embedding gives `scale · W[x]`; a delta changes W.
    rows = nn.functional.embedding(args[0], module.weight)
    return base(*args, **kwargs) + (nest(lambda x: nn.functional.embedding(x, module.weight))(*args) - rows) * scale


@contextmanager
def _set(module: nn.Module, **values: Any) -> Iterator[None]:
    before = {n: module.__dict__[n] for n in values}
    module.__dict__.update(values)
    try:
        yield
    finally:
        module.__dict__.update(before)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):
        # accelerate's hooks (device_map, offload) call what they found there; let them find the new class's.
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


@cache
def _adapted_class(base: Any, parameters: tuple[str, ...], configured: bool) -> type[AdaptedLayer]:
    # With the base's signature: transformers reads from it which columns of a dataset a model takes.
    @functools.wraps(base.forward)
    def forward(self: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        if "_running" not in vars(self):  # unloaded, and something kept this forward
            return base.forward(self, *args, **kwargs)
        return self._run(functools.partial(base.forward, self), *args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]

    def own_or_base(name: str) -> property:
        set_plainly = f"_plain_{name}"

        def get(self: AdaptedLayer) -> Any:
            if name in self._parameters:
                plain = self._parameters[name]
            elif set_plainly in vars(self):
                plain = vars(self)[set_plainly]
            else:
                raise AttributeError(f"{base.__name__!r} has no {name!r}")
            if not self.trained_copies or self._kept is not None or plain is None:
                return plain
            owner = self.current_copy
            if owner is None and self._running.rows is None:
                owner = next((n for n in self._running.active if n in self.trained_copies), None)
            mine = getattr(self.trained_copies[owner], name, None) if owner else None
            # The module computes in the dtype of its base whatever the copy is kept in.
            return plain if mine is None else mine.to(plain.dtype)

        def put(self: AdaptedLayer, value: Any) -> None:
            # DataParallel and FSDP set plain tensors in place of parameters.
            self.__dict__[set_plainly] = value

        return property(get, put)

    body: dict[str, Any] = {n: own_or_base(n) for n in parameters}
    if configured:
        body["config"] = property(_get_attention_config, lambda self, value: vars(self).update(config=value))
    body |= {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    # The base's name: transformers and people read it.
    return type(base.__name__, (AdaptedLayer, base), body)
