"""A model that was built on `meta`, made of fake tensors: the real code runs on them, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def make_fake(model: nn.Module) -> None:
    """Replace every tensor of a model that lies on meta by a fake one on the CPU; call it within a FakeTensorMode.

    What was tied or shared stays so, and so does the dtype of each. Tensors are looked for in parameters, buffers, and
    in what modules keep beside them, in lists, tuples and mappings too.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in list(table.items()):
                if name not in ("_parameters", "_buffers", "_modules"):
                    table[name] = _mapped(value, fake)


def _mapped(value: Any, fake: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fake(value) if value.is_meta else value
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, fake) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, fake) for k, v in value.items()}
    return value
