"""A model that was built on `meta`, made of fake tensors: the real code runs on them, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from ..errors import ModelError

KNOWN = 1 << 20
"""Numbers up to which a tensor of whole numbers keeps its values, where they follow from the batch alone."""
_aten: Any = torch.ops.aten
_COUNTED = {_aten.arange, _aten.eye, _aten.full, _aten.ones, _aten.zeros}
_UNSAFE_VIEW, _DEVICE = _aten._unsafe_view.default, torch.ops.prim.device.default
_CPU = torch.device("cpu")
_PLAIN = {int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Kinds of arguments that, beside tensors, say what an operator makes."""
_made: dict[tuple, Any] = {}
"""What operators made, by all it hangs on; NotImplemented: it is never the same."""


@contextmanager
def fake_mode() -> Iterator[Fakes]:
    """Make every new tensor a fake one for the length of the `with`.

    A batch's own whole numbers, and those that follow from them alone, stay known: transformers asks them whether rows
    are padded or lie in one sequence, and makes a mask only if so. Fakes it would not ask: it would think that a
    compiler traces.

    Raises:
        ModelError: something asks for values that are not known.
    """
    limit, tracing = fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing
    fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing = KNOWN, lambda *_: False
    try:
        with FakeTensorMode() as mode, Fakes(mode) as fakes:
            mode.cache_enabled = False  # `Fakes` remembers faster
            yield fakes
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        raise ModelError(
            f"the step hangs on values: {error} asks for them, and a plan has none",
            "a model and a method whose shapes follow from the rows' lengths",
        ) from error
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing = limit, tracing


class Fakes(TorchDispatchMode):
    """Runs operators as fakes do, and remembers what came of each: asked for the same again, it makes that itself.

    A plan runs few operators on few shapes, hundreds of times each, and fakes take ten times as long to look one up.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        # Making one by FakeTensor takes longer than all the rest: what is the same in each is copied.
        self.alike = vars(FakeTensor(mode, torch.empty((), device="meta"), _CPU))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a plan, and to say so takes as long as an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = self.recalled(func, args, kwargs)
        if out is not NotImplemented:
            return out
        out = self._run(func, types, args, kwargs)
        # The key as it is now: what was written to may have lost the values that were known.
        given: list[FakeTensor] = []
        key = _key(func, args, kwargs, given)
        if key is not None and key not in _made:
            _made[key] = self._noted(out, given)
        return out

    def recalled(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what an operator makes if that is remembered, else NotImplemented."""
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device  # asked as often as all else together
        given: list[FakeTensor] = []
        key = _key(func, args, kwargs, given)
        if key is None:
            return NotImplemented
        if func.is_view or func is _UNSAFE_VIEW:
            return self._viewed(func, args, kwargs)
        made = _made.get(key, NotImplemented)
        return made if made is NotImplemented else _each(made, partial(self._again, given))

    def _viewed(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with in_kernel_invocation_manager(self.mode):
            views = func(*args, **kwargs)
        views = _each(views, self._fake)
        if args[0].constant is None:
            return views
        with no_dispatch():
            known = func(args[0].constant, *args[1:], **kwargs)
        for view, real in zip(*([v] if isinstance(v, Tensor) else v for v in (views, known)), strict=True):
            if real.numel() > KNOWN:
                return NotImplemented
            view.constant = real
            self.mode.fake_tensor_converter.add_constant_storage_mapping(view)
        return views

    def _run(self, func: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator; what is counted up or filled in with whole numbers keeps them, as what is written down."""
        out = func(*args, **kwargs)
        if func.overloadpacket not in _COUNTED or types or out.is_floating_point() or out.numel() > KNOWN:
            return out
        with no_dispatch():
            real = func(*args, **kwargs)
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)

    def _noted(self, out: Any, given: list[FakeTensor]) -> Any:
        """Return what came out: for a tensor, which of the given ones it is, or how it is laid."""
        storages = [t.untyped_storage()._cdata for t in given]

        def note(one: Any) -> Any:
            if not isinstance(one, Tensor) and type(one) in _PLAIN:
                return one
            for number, each in enumerate(given):
                if one is each:
                    return _Given(number)
            if type(one) is not FakeTensor or one.constant is not None or one.fake_device != _CPU:
                raise _NotAlike
            laid, storage = _Laid(one.shape, one.stride(), one.dtype), one.untyped_storage()
            if storage._cdata in storages or storage.nbytes() != self._new(laid).untyped_storage().nbytes():
                raise _NotAlike
            storages.append(storage._cdata)
            return laid

        try:
            return _each(out, note)
        except _NotAlike:
            return NotImplemented

    def _again(self, given: list[FakeTensor], noted: Any) -> Any:
        kind = type(noted)
        return self._new(noted) if kind is _Laid else given[noted] if kind is _Given else noted

    def _new(self, laid: _Laid) -> FakeTensor:
        with no_dispatch():
            return self._fake(torch.empty_strided(laid.shape, laid.stride, dtype=laid.dtype, device="meta"))

    def _fake(self, tensor: Tensor) -> FakeTensor:
        made = Tensor._make_subclass(FakeTensor, tensor, dispatch_device=True, device_for_backend_keys=_CPU)
        vars(made).update(self.alike)
        return made


class _Laid(NamedTuple):
    """How a new tensor is laid, in a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Given(int):
    """The place of a tensor among those that an operator was given."""


class _NotAlike(Exception):
    """What an operator makes hangs on more than the shapes it is given."""


def _key(func: Any, args: tuple, kwargs: dict[str, Any], given: list[FakeTensor]) -> tuple | None:
    """Return all that decides what an operator makes, and add its tensors to `given`.

    None: it lays a tensor anew, may make values that are known or overwrite some, or is given what is no fake.
    """
    if torch.Tag.inplace_view in func.tags:
        return None
    key: list[Any] = [func, torch.get_default_dtype()]
    try:
        _note(key, args, given)
        if kwargs:
            _note(key, tuple(kwargs.items()), given)
    except _NotAlike:
        return None
    known = 0 if func.is_view else sum(t.constant is not None for t in given)
    if known and (known == len(given) or _overwrites_known(func, args, kwargs)):
        return None
    return tuple(key)


def _note(key: list[Any], value: Any, given: list[FakeTensor]) -> None:
    for each in value:
        kind = type(each)
        if kind is FakeTensor:
            if each._fake_device != _CPU:
                raise _NotAlike
            given.append(each)
            key += (each.shape, each.stride(), each.dtype)
        elif kind is list or kind is tuple:
            key.append(len(each))
            _note(key, each, given)
        elif kind in _PLAIN:
            key += (kind, each)
        else:
            raise _NotAlike


def _overwrites_known(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether an operator writes to a tensor whose values are known."""
    named = zip(func._schema.arguments, args, strict=False)
    written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
    found: list[FakeTensor] = []
    _note([], (*written, *kwargs.values()), found)
    return any(t.constant is not None for t in found)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return what an operator makes with each part of it changed."""
    return type(value)(map(change, value)) if type(value) in (list, tuple) else change(value)


def make_fake(model: nn.Module) -> None:
    """Replace every tensor of a model that lies on meta by a fake one on the CPU; call it while faking.

    What was tied or shared stays so, and so does the dtype of each. Tensors are looked for where `held_by` looks.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for table, name, value in _entries(model):
        table[name] = _mapped(value, fake)


@contextmanager
def restore_module(model: nn.Module) -> Iterator[None]:
    """Give a model back, after the `with`, the tensors it had, and all else that its modules held by name."""
    tables = [t for m in model.modules() for t in (m._parameters, m._buffers, vars(m))]
    before = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, entries in before:
            table.clear()
            table.update(entries)


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Return every tensor a model's modules hold: parameters, buffers, and what they keep beside them.

    Those are looked for in lists, tuples and mappings, too.
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for _, _, value in _entries(model):
        _mapped(value, note)
    return found


def _entries(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in list(table.items()):
                if name not in ("_parameters", "_buffers", "_modules"):
                    yield table, name, value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value
