"""The forgetting budget of a run: how much its loss on general text may rise above the base's.

    forgetting = (nats of the tuned model − nats of the base) / tokens        over rows of general text, nats per token

If the text has several kinds, such as prose and code, the kind that is forgotten most counts: what one loses is not
made up for by another. It is measured with every validation, on the same few rows. The best checkpoint is kept if it is
inside the budget. Else it becomes weaker until it is inside: bisection finds its strength
(core/adapters/adapter_strength.py). It is kept so, unless the best checkpoint that is
inside as it is has a lower validation loss: on the demo, weaker beats earlier.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..adapters.adapter_strength import AdapterTensorInterpolator
from ..data.collator import Example
from ..foundation.registry import Registry

BISECTIONS = 7
"""Halvings of the interval of strengths, so that the strength is known to 1/128."""


class GeneralTextSource(Protocol):
    """Text that an adapter is not trained on, in a file (evaluation/general_text.py)."""

    def choose_rows(self, tokenizer: Any, model: Any) -> list[Example]:
        """Return a few rows of every kind of the text, each with its `kind`."""


GENERAL_TEXTS: Registry[Callable[[Path | None], GeneralTextSource]] = Registry("slimtune.general_texts", "general text")
"""Functions that read a general text from a file; None: from the built-in one."""


def group_row_numbers_by_kind(rows: Sequence[Example]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each kind, kinds and rows in their order."""
    kinds: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row["kind"], []).append(number)
    return kinds


def max_loss_increase(tuned_by_kind: Mapping[str, float], base_by_kind: Mapping[str, float]) -> float:
    """Return how much the loss of the kind of text that is forgotten most is above the base's; NaN if one is NaN."""
    return float(np.max([tuned_by_kind[kind] - base_by_kind[kind] for kind in base_by_kind]))


def search_and_set_strength_within_budget(
    adapter_strength: AdapterTensorInterpolator, measure_forgetting: Callable[[], float], budget: float
) -> tuple[float, list[tuple[float, float]]]:
    """Give an adapter the largest strength whose forgetting is inside the budget; return it and all that were tried.

    `measure_forgetting` returns the forgetting at the current strength. Strength 0 forgets nothing and is not measured.
    """
    inside, outside, tried = 0.0, 1.0, []
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        adapter_strength.set(middle)
        tried.append((middle, forgetting := measure_forgetting()))
        inside, outside = (middle, outside) if forgetting <= budget else (inside, middle)
    adapter_strength.set(inside)
    return inside, tried
