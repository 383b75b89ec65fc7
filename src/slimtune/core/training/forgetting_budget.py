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
from typing import Any

import numpy as np

from ..adapters.adapter_strength import AdapterStrength, find_neutral_values
from ..data.collator import Example
from ..data.general_text import (
    BUILT_IN_TEXT,
    WINDOW,
    GeneralTextPiece,
    group_row_numbers_by_kind,
    read_general_text,
    tokenize_general_text,
)
from ..models.base_config import get_max_positions
from .loss import count_targets

GENERAL_TOKENS, TOKENS_OF_A_KIND = 2048, 512
"""Tokens of general text that are measured, about: in all, and at least of each kind."""
BISECTIONS = 7
"""Halvings of the interval of strengths, so that the strength is known to 1/128."""


def read_forgetting_text(budget: float | None, file: Path | None) -> list[GeneralTextPiece]:
    """Return the text to measure forgetting on, from a file or the built-in one; none without a budget."""
    return [] if budget is None else read_general_text(file or BUILT_IN_TEXT)


def choose_general_rows(
    pieces: Sequence[GeneralTextPiece], file: Path | None, tokenizer: Any, model: Any
) -> list[Example]:
    """Return rows of general text, taken evenly from each kind of it, that predict about `GENERAL_TOKENS` tokens.

    Args:
        pieces: the text; empty: no row is returned.
        file: where it is from, for errors; None: the built-in text.
        tokenizer: the base's.
        model: the adapted model; a row of general text has half of its positions at most.

    Raises:
        DataError: the chat template rejects messages, or there is nothing to predict.
        UsageError: the strength of the model's method cannot be reduced.
    """
    if not pieces:
        return []
    find_neutral_values(model, "default")
    context = get_max_positions(model.config) or 4 * WINDOW
    rows = tokenize_general_text(pieces, file or BUILT_IN_TEXT, tokenizer, min(context // 2, 2 * WINDOW))
    kinds = group_row_numbers_by_kind(rows)
    wanted = max(GENERAL_TOKENS // len(kinds), TOKENS_OF_A_KIND)
    chosen: list[Example] = []
    for numbers in kinds.values():
        every = max(1, round(sum(count_targets(rows[i]) for i in numbers) / wanted))
        chosen += [rows[i] for i in numbers[every // 2 :: every]]
    return chosen


def max_loss_increase(tuned_losses: Mapping[str, float], base_losses: Mapping[str, float]) -> float:
    """Return how much the loss of the kind of text that is forgotten most is above the base's; NaN if one is NaN."""
    return float(np.max([tuned_losses[kind] - base_losses[kind] for kind in base_losses]))


def reduce_strength_to_budget(
    strength: AdapterStrength, measure: Callable[[], float], budget: float
) -> tuple[float, list[tuple[float, float]]]:
    """Give an adapter the largest strength whose forgetting is inside the budget; return it and all that were tried.

    `measure` returns the forgetting at the strength that is set. Strength 0 forgets nothing, so it is never measured.
    """
    inside, outside, tried = 0.0, 1.0, []
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        strength.set(middle)
        tried.append((middle, forgetting := measure()))
        inside, outside = (middle, outside) if forgetting <= budget else (inside, middle)
    strength.set(inside)
    return inside, tried
