"""Fake tensors: the training code runs on tensors that have a shape and a dtype and no values, so nothing is computed.

A `FakeTensor` is PyTorch's own stand-in for a tensor. Inside `fake_tensor_mode` every tensor that is made is fake, and
every operator returns a fake result with the right shape, strides, dtype and storage size. A model built on `meta`
becomes a model of fake tensors by `replace_meta_with_fake_cpu_tensors`. Its device is the CPU: a fake CUDA tensor
aborts on a torch without CUDA.
"""

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.integrations import moe
from transformers.utils import logging as transformers_logging

from ..core.foundation.device import get_real_or_simulated_device_type
from ..errors import ModelError
from .memory_tracker import iterate_nested_tensors

MAX_KNOWN_INTEGERS = 1 << 20
"""Integer tensors of up to so many elements keep their values."""
MAX_KNOWN_RESULTS = 100_000
"""Operators whose results are kept from trace to trace; a plan adds some thousands."""
_aten: Any = torch.ops.aten
_CREATES_INTEGERS = {_aten.arange, _aten.eye, _aten.full, _aten.ones, _aten.zeros}
_DEVICE, _GROUP_PRODUCT = torch.ops.prim.device.default, torch.ops.aten._grouped_mm.default
_CPU = torch.device("cpu")
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_META_KERNELS = {
    _aten.view, _aten.slice, _aten.select, _aten.unsqueeze, _aten.squeeze, _aten.transpose, _aten.t, _aten.permute,
    _aten.expand, _aten.as_strided, _aten.detach, _aten.alias, _aten.split, _aten.split_with_sizes, _aten.unbind,
    _aten.clone, _aten._to_copy, _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.mm, _aten.bmm, _aten.addmm, _aten.sum, _aten.mean, _aten.cat, _aten.select_backward, _aten.slice_backward,
    _aten.mul, _aten.add, _aten.sub, _aten.div, _aten.neg, _aten.exp, _aten.rsqrt, _aten.pow, _aten.silu,
    _aten.sigmoid, _aten.silu_backward, _aten.sigmoid_backward, _aten.softplus, _aten.cumsum, _aten.fill_,
    _aten.copy_, _aten.mul_, _aten.add_, _aten.masked_fill, _aten.tril, _aten.triu, _aten.new_zeros, _aten.new_empty,
}  # fmt: skip
"""Operators of which PyTorch's meta kernel says all that FakeTensorMode does, ten times as fast."""
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
_IGNORES_CONSTANTS = {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view}
"""Operators that FakeTensorMode does not compute where it knows all values."""


@contextmanager
def fake_tensor_mode() -> Iterator["FakeOperators"]:
    """Make every new tensor a fake one inside the `with`.

    Token ids, masks and positions keep their values, because transformers reads them: it builds an attention mask only
    if rows are padded. It does not read them if `masking_utils.is_tracing` says that a compiler traces the model, which
    it says of every fake tensor; a compiled model always has a mask, so its memory would not be that of a real step.
    FakeTensor itself can carry the values of a tensor as its `constant`, by default of one element.

    Raises:
        ModelError: the code asks for a value that is not known.
    """
    if len(_KNOWN_RESULTS) > MAX_KNOWN_RESULTS:
        _KNOWN_RESULTS.clear()
    limit, is_tracing, can_use = fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing, moe._can_use_grouped_mm
    fake_tensor.CONSTANT_NUMEL_LIMIT = MAX_KNOWN_INTEGERS
    fake_tensor.log.disabled = True  # it prints a traceback for an error that is raised anyway
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of kernels that are not installed, and nothing is computed
    masking_utils.is_tracing = lambda *_: False
    # A GPU older than Ampere takes transformers' own product of experts, which makes a gradient of frozen experts, too.
    moe._can_use_grouped_mm = _require_bfloat16_on_gpus(can_use)
    try:
        with FakeTensorMode() as mode, FakeOperators(mode) as operators:
            yield operators
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        frames, ours = traceback.extract_tb(error.__traceback__), (*torch.__path__, os.path.dirname(__file__))
        reader = next((f for f in reversed(frames) if not f.filename.startswith(ours)), frames[-1])
        raise ModelError(
            f"the training step depends on tensor values: {error} reads them in {reader.filename}, line "
            f"{reader.lineno}, {reader.line!r}, and a plan has none",
            "a model and a method whose forward reads no tensor values: shapes follow from the lengths of the rows",
        ) from error
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing, moe._can_use_grouped_mm = limit, is_tracing, can_use
        fake_tensor.log.disabled = False
        transformers_logging.set_verbosity(verbosity)


def _require_bfloat16_on_gpus(can_use_grouped_mm: Any) -> Any:
    def can_use(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
        is_known = weight.dtype == torch.bfloat16 or get_real_or_simulated_device_type(weight.device) == "cpu"
        return is_known and bool(can_use_grouped_mm(input, weight, offs))

    return can_use


def _multiply_groups(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """Return what torch's product of experts makes: its own fake takes bfloat16 alone, its kernels every dtype."""
    groups = () if a.dim() != b.dim() else (len(a) if offs is None or a.dim() == 3 else len(offs),)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


class FakeOperators(TorchDispatchMode):
    """Answers operators on fake tensors; gives new integer tensors their values, as FakeTensor does for `tensor([…])`.

    FakeTensorMode takes 100 µs for an operator that it has seen, and several hundred for one that it has not. A step is
    the same few hundred operators again and again, so what an operator makes is kept by the shapes of its arguments.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        mode.cache_enabled = False  # what an operator makes is kept here
        self.attributes = dict(vars(torch.empty(0)))  # a fake tensor is like another in all but its shape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in MemoryTracker

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if (found := self.find_result(func, args, kwargs)) is not NotImplemented:
            return found
        out = func(*args, **kwargs)
        is_new = func.overloadpacket in _CREATES_INTEGERS and not types and not out.is_floating_point()
        if is_new and out.numel() <= MAX_KNOWN_INTEGERS:
            with no_dispatch():
                values = func(*args, **kwargs)
            return self.mode.fake_tensor_converter.from_real_tensor(self.mode, values, make_constant=True)
        key: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        constants: list[Tensor] = []
        if not _describe_arguments((args, *kwargs.items()), key, tensors, constants):
            return out
        if (kept := tuple(key)) not in _KNOWN_RESULTS and not _needs_constants(func, tensors, constants):
            _KNOWN_RESULTS[kept] = self._describe_results(func, out, tensors)
        return out

    def find_result(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what an operator makes, without FakeTensorMode; NotImplemented if only FakeTensorMode knows it."""
        if func is _DEVICE and type(args[0]) is FakeTensor:  # every second call asks what device a tensor is on
            return args[0].fake_device
        if func is _GROUP_PRODUCT and args[0].dtype != torch.bfloat16:
            return _multiply_groups(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        key: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        constants: list[Tensor] = []
        if not _describe_arguments((args, *kwargs.items()), key, tensors, constants):
            return NotImplemented
        if constants and _needs_constants(func, tensors, constants):
            return self._compute_constants(func, args, kwargs)
        known = _KNOWN_RESULTS.get(kept := tuple(key))
        if known is None and tensors and func.overloadpacket in _META_KERNELS and kept not in _KNOWN_RESULTS:
            if kwargs.get("device") is not None:
                return NotImplemented
            with in_kernel_invocation_manager(self.mode):
                meta = func(*args, **kwargs)
            known = _KNOWN_RESULTS[kept] = self._describe_results(func, meta, tensors)
        if known is None:
            return NotImplemented
        results = [self._make_result(result, tensors) for result in known.results]
        return results[0] if known.kind is None else known.kind(results)

    def _compute_constants(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what an operator makes of values that are known, as FakeTensorMode computes it."""
        if fake_tensor.get_schema_info(func).is_mutable() or not _IGNORES_CONSTANTS.isdisjoint(func.tags):
            return NotImplemented
        args, kwargs = tree_map_only(FakeTensor, lambda t: t.constant, (args, kwargs))
        with no_dispatch():
            out = func(*args, **kwargs)
        if not all(self.mode.may_turn_const(t) for t in iterate_nested_tensors(out)):
            return NotImplemented
        convert = self.mode.fake_tensor_converter.from_real_tensor
        return tree_map_only(Tensor, lambda t: convert(self.mode, t, make_constant=True), out)

    def _make_result(self, known: Any, tensors: list[FakeTensor]) -> Any:
        if type(known) is int:
            return tensors[known]
        if known is None:
            return None
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
            if known.viewed is not None:
                meta.set_(tensors[known.viewed].untyped_storage(), known.offset, known.shape, known.stride)
            fake = Tensor._make_subclass(
                FakeTensor,
                meta,
                False,
                dispatch_device=True,
                device_for_backend_keys=_CPU,
            )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self.attributes)
        return fake

    def _describe_results(self, func: Any, out: Any, tensors: list[FakeTensor]) -> "_KnownResults | None":
        """Return what makes the results of an operator again; None if they follow from more than shapes."""
        if not isinstance(func, torch._ops.OpOverload) or _DEPENDS_ON_VALUES.intersection(func.tags):
            return None
        if not torch._library.utils.is_builtin(func) or func in self.mode.lift_fns:
            return None
        kind = type(out) if type(out) in (tuple, list) else None
        storages: dict[int, int | None]
        storages = {t.untyped_storage()._cdata: i for i, t in reversed([*enumerate(tensors)])}
        made_storages: set[int] = set()
        known: list[Any] = []
        for each in [out] if kind is None else out:
            given = next((i for i, tensor in enumerate(tensors) if tensor is each), None)
            if each is None or given is not None:
                known.append(given)
                continue
            if type(each) not in (FakeTensor, Tensor) or getattr(each, "constant", None) is not None:
                return None
            if each.layout != torch.strided or each.dtype.is_complex or each.requires_grad:
                return None
            storage = each.untyped_storage()
            if (viewed := storages.setdefault(storage._cdata, None)) is None:
                if storage._cdata in made_storages:  # two views of one new storage
                    return None
                made_storages.add(storage._cdata)
            result = _KnownTensor(each.shape, each.stride(), each.dtype, each.storage_offset(), viewed)
            made = self._make_result(result, tensors)
            if made.untyped_storage().nbytes() != storage.nbytes() or made.storage_offset() != result.offset:
                return None
            if type(each) is FakeTensor and torch._C._dispatch_key_set(made) != torch._C._dispatch_key_set(each):
                return None
            known.append(result)
        return _KnownResults(kind, known)


class _KnownTensor(NamedTuple):
    """A tensor that an operator makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    viewed: int | None  # the place of the tensor, among those given, of which it is a view


class _KnownResults(NamedTuple):
    """What an operator returns."""

    kind: type[tuple] | type[list] | None  # None: a single result
    results: list[Any]  # a _KnownTensor, the place of a given tensor, or None


_KNOWN_RESULTS: dict[tuple, _KnownResults | None] = {}
"""By an operator and its arguments, tensors by their shapes; None: FakeTensorMode is to be asked."""


def _needs_constants(func: Any, tensors: list[FakeTensor], constants: list[Tensor]) -> bool:
    """Return whether an operator may compute values or change known ones; else its results follow from shapes."""
    return bool(constants) and (len(constants) == len(tensors) or fake_tensor.get_schema_info(func).is_mutable())


def _describe_arguments(
    values: Iterable[Any], key: list[Any], tensors: list[FakeTensor], constants: list[Tensor]
) -> bool:
    """Append what results depend on to a key, and the tensors among the arguments; return whether that is all.

    `constants` gets the values of tensors whose values are known.
    """
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.dtype.is_complex or value.layout != torch.strided or value.fake_device != _CPU:
                return False
            if value.constant is not None:
                constants.append(value.constant)
            key += (value.shape, value.stride(), value.dtype, value.storage_offset())
            tensors.append(value)
        elif kind in _PLAIN:
            key += (kind, value)  # 1 and 1.0 are equal
        elif kind is tuple or kind is list:
            key.append(len(value))
            if not _describe_arguments(value, key, tensors, constants):
                return False
        else:
            return False
    return True


def replace_meta_with_fake_cpu_tensors(model: nn.Module) -> None:
    """Replace every meta tensor of a model by a fake CPU tensor; call it inside `fake_tensor_mode`.

    Tensors are replaced wherever `list_module_tensors` finds them; shared and tied tensors stay shared.
    """
    replaced: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(convert(v) for v in value)
        if type(value) is dict:
            return {k: convert(v) for k, v in value.items()}
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) not in replaced and is_traceable_wrapper_subclass(value):
            names, how = value.__tensor_flatten__()
            packed = type(value).__tensor_unflatten__({n: convert(getattr(value, n)) for n in names}, how, None, None)
            replaced[id(value)] = nn.Parameter(packed, value.requires_grad)
        elif id(value) not in replaced:
            new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            is_parameter = isinstance(value, nn.Parameter)
            replaced[id(value)] = nn.Parameter(new, value.requires_grad) if is_parameter else new
        return replaced[id(value)]

    for attributes, name, value in _module_attributes(model):
        attributes[name] = convert(value)


def list_module_tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters, buffers, and the tensors in other attributes of a model's modules, also in lists and dicts."""
    return [tensor for _, _, value in _module_attributes(model) for tensor in iterate_nested_tensors(value)]


def _module_attributes(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for module in model.modules():
        for attributes in (module._parameters, module._buffers, vars(module)):
            for name, value in list(attributes.items()):
                may_hold = isinstance(value, Tensor) or (isinstance(value, (list, tuple, dict)) and value)
                if may_hold and name not in ("_parameters", "_buffers", "_modules"):
                    yield attributes, name, value
