"""The forgetting budget of a run: how much its loss on general text may rise above the base's.

    forgetting = (nats of the tuned model − nats of the base) / tokens        over rows of general text, nats per token

It is measured with every validation, on the same few rows. The best checkpoint is kept if it is inside the budget.
Else it becomes weaker until it is inside: bisection finds its strength (adapters/strength.py). It is kept so, unless
the best checkpoint that is inside as it is has a lower validation loss: on the demo, weaker beats earlier.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..adapters.strength import AdapterStrength
from ..data.collator import Example
from ..data.general_text import BUILT_IN_TEXT, WINDOW, TextPiece, tokenize_general_text

GENERAL_TOKENS = 2048
"""Tokens of general text that are measured, about."""
BISECTIONS = 7
"""Halvings of the interval of strengths, so that the strength is known to 1/128."""


def choose_general_rows(pieces: Sequence[TextPiece], file: Path | None, tokenizer: Any, context: int) -> list[Example]:
    """Return rows of general text with about `GENERAL_TOKENS` tokens, taken evenly from all of it.

    Args:
        pieces: the text.
        file: where it is from, for errors; None: the built-in text.
        tokenizer: the base's.
        context: the base's longest row in tokens; a row of general text has half of it at most.

    Raises:
        DataError: the chat template rejects messages, or there is nothing to predict.
    """
    rows = tokenize_general_text(pieces, file or BUILT_IN_TEXT, tokenizer, min(context // 2, 2 * WINDOW))
    tokens = sum(len(row["input_ids"]) for row in rows)
    every = max(1, round(tokens / GENERAL_TOKENS))
    return rows[every // 2 :: every]


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
