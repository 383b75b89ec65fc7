"""An adapter's strength: one number, 0 for the base and 1 for the adapter as it was trained.

    θ(s) = θ₀ + s (θ − θ₀)

θ are the tensors that carry a module's change, and θ₀ their values at which the module changes nothing: zero for LoRA's
B, one for the factors of (IA)³, the base's own rows and weights where copies of them train. LoRA's change is s times
what it was. A prompt always changes something: its θ₀ is where its training started. The tensors themselves change, so
a file and a merge contain the weaker adapter without knowing of it.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.adapters.adapted_layer import read_adapter_site
from ..errors import UsageError

MOST_STRENGTHS = 6
"""Strengths that are tried."""
CLOSE_TO_BUDGET = 0.9
"""A strength that forgets this share of the budget is as good as the largest one inside it."""


class AdapterTensorInterpolator:
    """Sets the strength of one adapter of a model; keeps a copy of its tensors as they are now.

    Args:
        model: the adapted model.
        adapter_name: the adapter.
        modules: names of the adapted modules whose strength it sets; None: all.

    Raises:
        UsageError: a method's modules have no such tensors, as those of a prompt that was loaded.
    """

    def __init__(self, model: Any, adapter_name: str, modules: Collection[str] | None = None) -> None:
        self.tensors = [
            (t, t.detach().clone(), no_op) for t, no_op in pair_tensors_with_no_op_values(model, adapter_name, modules)
        ]

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Give the adapter this strength, 0 to 1; 1 restores its tensors bit for bit."""
        for tensor, trained, no_op in self.tensors:
            if isinstance(no_op, Tensor):
                no_op = no_op.to(trained)
            tensor.copy_(trained if strength == 1 else no_op + strength * (trained - no_op))


def pair_tensors_with_no_op_values(
    model: Any, adapter_name: str, modules: Collection[str] | None = None
) -> list[tuple[Tensor, Any]]:
    """Return the tensors θ of an adapter, each once, with their θ₀; arguments and errors as for the class above."""
    kinds = model.match_report(adapter_name).kinds
    found: dict[int, tuple[Tensor, Any]] = {}
    with model.disable_adapter(), torch.no_grad():  # modules read the base's own weights
        for name, module in model.adapter_modules(adapter_name).items():
            if modules is not None and name not in modules:
                continue
            if not module.has_strength:
                message = f"the method {module.method} has no strength that can be reduced"
                raise UsageError(message, "a method whose change has a size, such as lora")
            values = module.get_no_op_values(read_adapter_site(name, kinds[name], model))
            tensors = dict([*module.named_parameters(), *module.named_buffers()])
            found |= {id(tensors[n]): (tensors[n], value) for n, value in values.items()}
        for name, adapted in model.adapted_layers(adapter_name).items():
            if adapter_name in adapted.trained_copies and (modules is None or name in modules):
                for n, copy in adapted.trained_copies[adapter_name].named_parameters():
                    found[id(copy)] = copy, adapted._parameters[n]
    return list(found.values())


def search_and_set_strength_within_budget(
    model: Any,
    measure_forgetting: Callable[[], float],
    forgetting: float,
    budget: float,
) -> tuple[float, list[tuple[float, float]]]:
    """Give a model's adapter the largest strength that keeps a budget; return it and all that were tried.

    `measure_forgetting` returns the forgetting at the current strength; `forgetting` is that at strength 1. Strength 0
    forgets nothing and is not measured, but for a prompt, whose start is kept if even that is outside the budget.
    """
    adapter_strength = AdapterTensorInterpolator(model, "default")
    # Forgetting grows like the square of the strength at first, so its root is interpolated linearly.
    inside, outside, tried = (0.0, 0.0), (1.0, _root(forgetting)), list[tuple[float, float]]()
    if model.active_peft_config.is_prompt_learning:
        adapter_strength.set(0.0)
        tried.append((0.0, change := measure_forgetting()))
        if not change <= budget:
            return 0.0, tried
        inside = 0.0, _root(change)
    for _ in range(MOST_STRENGTHS):
        share = (_root(budget) - inside[1]) / (outside[1] - inside[1])
        strength = inside[0] + (outside[0] - inside[0]) * float(np.clip(np.nan_to_num(share, nan=0.5), 0.1, 0.9))
        adapter_strength.set(strength)
        tried.append((strength, change := measure_forgetting()))
        if change <= budget:
            inside = strength, _root(change)
            if change >= CLOSE_TO_BUDGET * budget:
                break
        else:
            outside = strength, _root(change)
    adapter_strength.set(inside[0])
    return inside[0], tried


def _root(forgetting: float) -> float:
    return math.sqrt(max(forgetting, 0.0))
