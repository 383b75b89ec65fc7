"""Fake tensors: the training code runs on tensors that have a shape and a dtype and no values, so nothing is computed.

A `FakeTensor` is PyTorch's own stand-in for a tensor. Inside `fake_tensor_mode` every tensor that is made is fake, and
every operator returns a fake result with the right shape, strides, dtype and storage size. A model built on `meta`
becomes a model of fake tensors by `replace_meta_with_fake_cpu_tensors`. Its device is the CPU: a fake CUDA tensor
aborts on a torch without CUDA.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.integrations import moe

from ..errors import ModelError
from .memory_tracker import iterate_nested_tensors

MAX_KNOWN_INTEGERS = 1 << 20
"""Integer tensors of up to so many elements keep their values."""
_aten: Any = torch.ops.aten
_CREATES_INTEGERS = {_aten.arange, _aten.eye, _aten.full, _aten.ones, _aten.zeros}
_DEVICE = torch.ops.prim.device.default


@contextmanager
def fake_tensor_mode() -> Iterator[None]:
    """Make every new tensor a fake one inside the `with`.

    Token ids, masks and positions keep their values, because transformers reads them: it builds an attention mask only
    if rows are padded. It does not read them if `masking_utils.is_tracing` says that a compiler traces the model, which
    it says of every fake tensor; a compiled model always has a mask, so its memory would not be that of a real step.
    FakeTensor itself can carry the values of a tensor as its `constant`, by default of one element.

    Raises:
        ModelError: the code asks for a value that is not known.
    """
    limit, is_tracing, can_use = fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing, moe._can_use_grouped_mm
    fake_tensor.CONSTANT_NUMEL_LIMIT = MAX_KNOWN_INTEGERS
    fake_tensor.log.disabled = True  # it prints a traceback for an error that is raised anyway
    masking_utils.is_tracing = lambda *_: False
    # torch's product of experts has a fake in bfloat16 alone; transformers' own, for other dtypes, has one in each.
    moe._can_use_grouped_mm = _require_bfloat16(can_use)
    try:
        with FakeTensorMode() as mode, _KnownIntegers(mode):
            yield
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


def _require_bfloat16(can_use_grouped_mm: Any) -> Any:
    def can_use(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and bool(can_use_grouped_mm(input, weight, offs))

    return can_use


class _KnownIntegers(TorchDispatchMode):
    """Gives new integer tensors (`arange`, `zeros`, …) their values, as FakeTensor does for `torch.tensor([…])`.

    It also answers what device a tensor is on, which is every second call and slow in FakeTensorMode.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket not in _CREATES_INTEGERS or types:
            return out
        if out.is_floating_point() or out.numel() > MAX_KNOWN_INTEGERS:
            return out
        with no_dispatch():
            values = func(*args, **kwargs)
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, values, make_constant=True)


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
        if id(value) not in replaced:
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
                if name not in ("_parameters", "_buffers", "_modules"):
                    yield attributes, name, value
