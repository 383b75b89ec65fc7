"""A model that was built on `meta`, made of fake tensors: the real code runs on them, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from ..errors import ModelError

KNOWN = 1 << 20
"""Numbers up to which a tensor of whole numbers keeps its values, where they follow from the batch alone."""
_aten: Any = torch.ops.aten
_COUNTED = {_aten.arange, _aten.eye, _aten.full, _aten.ones, _aten.zeros}


@contextmanager
def faking() -> Iterator[None]:
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
        with fake_tensor.FakeTensorMode() as mode, _Counted(mode):
            yield
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        raise ModelError(
            f"the step hangs on values: {error} asks for them, and a plan has none",
            "a model and a method whose shapes follow from the rows' lengths",
        ) from error
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.is_tracing = limit, tracing


class _Counted(TorchDispatchMode):
    """Lets what is counted up or filled in with whole numbers keep them, as fakes keep what is written down."""

    def __init__(self, mode: fake_tensor.FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _COUNTED or types or out.is_floating_point() or out.numel() > KNOWN:
            return out
        with no_dispatch():
            real = func(*args, **(kwargs or {}))
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)


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


def held_by(model: nn.Module) -> list[Tensor]:
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
