"""How many tokens an example has: what a plan needs to know of the rows.

    a row of n tokens                                              n
    a prompt of p tokens with answers of a, b and c tokens         (p, a, b, c)
    rows of a, b and c tokens that do not begin alike              (0, a, b, c)

A model that shares prefixes (packing.py) computes a prompt once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..foundation.sequences import count_common_prefix

Tokens = Sequence[int]
ExampleLength = int | tuple[int, ...]
MIN_SHARED_TOKENS = 8
"""Shortest prefix that is stored once. Attention is computed by segment, and every segment costs a little."""


class DatasetRowComposition(NamedTuple):
    """What the rows of a data set are made of, beside their lengths; packing stores a prefix once."""

    shared_prefix_tokens: int = 0  # that all examples of one row begin with, as a system prompt; 0: too few to share
    supervised_share: float = 1.0  # share of all tokens that have a loss
    teacher_prefix_tokens: int = 0  # that all rows begin with as a teacher reads them
    teacher_row_tokens: int = 0  # that it reads more in a row than the student, at most
    samples_answers: bool = False  # whether answers are sampled


ALL_SUPERVISED = DatasetRowComposition()


def measure_example_length(rows_of_example: Sequence[Tokens]) -> ExampleLength:
    """Return the length of an example of these rows; tokens that only some of them share count as if none did."""
    if len(rows_of_example) == 1:
        return len(rows_of_example[0])
    shared = min(count_common_prefix(rows_of_example[0], row) for row in rows_of_example[1:])
    prefix = shared if shared >= MIN_SHARED_TOKENS else 0
    return (prefix, *(len(row) - prefix for row in rows_of_example))


def count_tokens_per_row(example_length: ExampleLength) -> list[int]:
    """Return the tokens of each row of an example."""
    return [example_length] if isinstance(example_length, int) else [example_length[0] + n for n in example_length[1:]]
