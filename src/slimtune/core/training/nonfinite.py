"""NaN and Inf: weights of a base, and rows of a step, that contain or give them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.collator import Collator, Example
from ..data.tokenize import format_line_numbers
from ..kernels.linear_layers import dequantizes_itself, is_finite, list_quantization_scales
from .loss import score_examples_by_objective
from .objective import Objective

EVENT = "non-finite"
"""Value of `event` in the lines of metrics.jsonl about a loss or gradient of NaN or Inf."""


def find_nonfinite_weights(model: Any) -> list[str]:
    """Return the names of a model's weights, or of quantized ones the scales, that contain NaN or Inf."""
    found = []
    for name, weight in model.named_parameters():
        scales = list_quantization_scales(weight)
        is_plain = weight.is_floating_point() and weight.itemsize > 1 and not dequantizes_itself(weight)
        plain = [weight] if is_plain and not scales else []
        if not all(map(is_finite, (*scales, *plain))):
            found.append(name)
    return found


def find_nonfinite_lines(model: Any, rows: Sequence[Example], collator: Collator, objective: Objective) -> list[int]:
    """Return the lines of the rows whose own loss is NaN or Inf; each row is computed alone."""
    alone = {"divide_into_micro_batches": lambda some: [[i] for i in range(len(some))]}
    return select_nonfinite_lines(rows, score_examples_by_objective(model, rows, collator, objective, **alone))


def select_nonfinite_lines(rows: Sequence[Example], scores: Mapping[int, Sequence[float]]) -> list[int]:
    """Return the lines of the rows with a score of NaN or Inf."""
    return sorted(rows[i]["line"] for i, measures in scores.items() if not all(map(math.isfinite, measures)))


def describe_nonfinite(
    quantity: str, value: float, bad_lines: Sequence[int], rows: Sequence[Example], split: str
) -> str:
    """Say that something is NaN or Inf, and which of the rows have such a loss, or that none has."""
    is_value = f"{quantity} is {'NaN' if math.isnan(value) else 'Inf'}"
    every = sorted(row["line"] for row in rows)
    if not bad_lines:
        where = format_line_numbers(every)
        return f"{is_value}: each row alone has a finite loss; the {split} rows are those of {where}"
    share = "every row" if len(bad_lines) == len(every) else f"{len(bad_lines)} of {len(every)} rows"
    which = format_line_numbers(list(bad_lines))
    return f"{is_value}: the loss of {share} is NaN or Inf ({which} of the {split} rows)"
