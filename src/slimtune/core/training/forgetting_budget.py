"""The forgetting budget of a run: how much its loss on general text may rise above the base's.

    forgetting = (nats of the tuned model − nats of the base) / tokens        over rows of general text, nats per token

If the text has several kinds, such as prose and code, the kind that is forgotten most counts: what one loses is not
made up for by another. It is measured on the same few rows after the last step and, unless the budget is `auto` and
the adapter can be made weaker, with every validation. The best checkpoint is kept if it is inside the budget. Else it
becomes weaker until it is inside (extras/adapter_strength.py), a prompt more like its start. It gives way to the best
checkpoint that is inside as it is, if that has a lower validation loss: on the demo, weaker beats earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..foundation.registry import Registry

if TYPE_CHECKING:
    from ..config import Recipe
    from ..data.collator import Example

DEFAULT_FORGETTING_BUDGET = 0.1
"""Nats per token of general text that `train` and `eval` let a run forget."""


class GeneralTextSource(Protocol):
    """Text that an adapter is not trained on, in a file (evaluation/general_text.py)."""

    def choose_rows(self, recipe: Recipe, tokenizer: Any, model: Any, say: Callable[[str], None]) -> list[Example]:
        """Return a few rows of every kind of the text, each with its `kind`; none if forgetting cannot be limited."""


GENERAL_TEXTS: Registry[Callable[[Path | None], GeneralTextSource]] = Registry("slimtune.general_texts", "general text")
"""Functions that read a general text from a file; None: from the built-in one."""
STRENGTH_SEARCHES: Registry[Callable[..., tuple[float, list[tuple[float, float]]]]] = Registry(
    "slimtune.strength_searches", "strength search"
)
"""Functions that make an adapter as weak as a budget asks (extras/adapter_strength.py)."""


def get_forgetting_budget(recipe: Recipe) -> float | None:
    """Return the most that a run may forget, in nats per token of general text; None: it is not measured."""
    if recipe.train.forgetting_budget != "auto":
        return recipe.train.forgetting_budget
    measurable = recipe.objective().task_type == "CAUSAL_LM" and not recipe.train.fsdp
    return DEFAULT_FORGETTING_BUDGET if measurable else None


def group_row_numbers_by_kind(rows: Sequence[Example]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each kind, kinds and rows in their order."""
    kinds: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row["kind"], []).append(number)
    return kinds


def max_loss_increase(tuned_by_kind: Mapping[str, float], base_by_kind: Mapping[str, float]) -> float:
    """Return how much the loss of the kind of text that is forgotten most is above the base's; NaN if one is NaN."""
    return float(np.max([tuned_by_kind[kind] - base_by_kind[kind] for kind in base_by_kind]))
