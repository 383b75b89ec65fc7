"""Common prefixes of sequences and texts."""

from collections.abc import Sequence
from typing import Any

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""


def count_common_prefix(a: Sequence[Any], b: Sequence[Any], start: int = 0) -> int:
    """Return how many first items two sequences share; the first `start` are known to be equal."""
    low, high = start, min(len(a), len(b))
    if a[low:high] == b[low:high]:
        return high
    while low < high:  # a binary search, because Python compares slices much faster than single items
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def find_shared_prefix(items: Sequence[Any]) -> Any:
    """Return what all lists, or all texts, begin with."""
    first, last = min(items), max(items)  # in sorted order, what these two share, all share
    return first[: count_common_prefix(first, last)]
