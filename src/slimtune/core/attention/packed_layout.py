"""Packed sequences: rows in one sequence without padding, with shared prefixes stored once.

    rows        S a b     S a c     d e              S: tokens that several rows start with
    packed      S a | b | c | d e                    four segments; those of b and c have the parent S a, d e has none
    positions   0 1   2   2   0 1

A token attends to all tokens of its segment's ancestors and to its own segment up to itself: exactly the tokens it
would see if its row ran alone. So hidden states, losses and gradients equal those of rows run one by one, up to
rounding. A sliding window of w covers a token and the w − 1 positions before it on its path.

`register.py` makes a model accept a layout, as a keyword argument of the call; `packed_attention.py` computes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

RowMask = Tensor | None
"""Which rows of a batch an adapter applies to, bool `(batch,)`; None: all rows."""


@dataclass(frozen=True)
class PackedLayout:
    """The segments of one packed sequence, as plain numbers, so that shapes in a step do not depend on tensor values.

    Args:
        lengths: tokens per segment, in the order of the sequence.
        parents: index of each segment's parent, which comes earlier; -1: none.
        prefix_keys: number of learned keys that every row attends to and that are not tokens (prefix tuning).
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    num_prefix_keys: int = 0
    _cache: dict[tuple, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.parents)
        assert all(-1 <= p < i for i, p in enumerate(self.parents))

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def ancestors(self, segment: int) -> list[int]:
        """Return the indices of a segment's ancestors, the root first, and its own."""
        path = [segment]
        while (parent := self.parents[path[-1]]) >= 0:
            path.append(parent)
        return path[::-1]

    def starts(self) -> list[int]:
        """Return the position of each segment's first token in its row."""
        starts: list[int] = []
        for parent in self.parents:
            starts.append(starts[parent] + self.lengths[parent] if parent >= 0 else 0)
        return starts

    def positions(self) -> list[int]:
        """Return each token's position in its row."""
        return [start + t for start, n in zip(self.starts(), self.lengths, strict=True) for t in range(n)]

    def count_pairs(self, window: int | None) -> int:
        """Return the number of pairs of a token and a key that it attends to."""
        pairs = 0
        for n, start in zip(self.lengths, self.starts(), strict=True):
            above = start + self.num_prefix_keys
            inside = n if window is None else min(n, max(0, window - above))  # tokens whose window has all keys
            pairs += inside * above + inside * (inside + 1) // 2 + (n - inside) * (window or 0)
        return pairs

    def with_prefix_keys(self, n: int) -> Self:
        """Return the layout with `n` more learned keys; one object for all layers, so that they share its masks."""
        return self.compute_once(
            ("with_prefix_keys", n), lambda: replace(self, num_prefix_keys=self.num_prefix_keys + n, _cache={})
        )

    def with_shared_prefix(self, n: int) -> Self:
        """Return the layout with a new first segment of `n` tokens, an ancestor of all others."""
        parents = (-1, *(p + 1 for p in self.parents))
        return replace(self, lengths=(n, *self.lengths), parents=parents, _cache={})

    def split_segments(self, tokens: int, longest: int) -> Self:
        """Return a layout with the same attention, whose segments of up to `longest` tokens have at most `tokens`.

        Each part of a segment is the child of the part before it.
        """
        lengths: list[int] = []
        parents: list[int] = []
        last: list[int] = []  # by segment: its last part
        for n, parent in zip(self.lengths, self.parents, strict=True):
            above, size = last[parent] if parent >= 0 else -1, tokens if n <= longest else n
            for start in range(0, n, size):
                lengths.append(min(size, n - start))
                parents.append(above)
                above = len(lengths) - 1
            last.append(above)
        return replace(self, lengths=tuple(lengths), parents=tuple(parents), _cache={})

    def compute_once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return the value of `key`, which `make` computes the first time."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def clear_cache(self) -> None:
        """Free the cached masks; they are made again when needed."""
        self._cache.clear()

    def segment_bias(self, segment: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return what is added to a segment's scores `(1, 1, tokens, keys of its path)`; None: causal without more."""
        n, above = self.lengths[segment], self.starts()[segment] + self.num_prefix_keys
        if window is not None and window >= above + n:
            window = None
        if not above and window is None:
            return None

        def make() -> Tensor:
            query_position = torch.arange(n, device=device)[:, None] + above
            distance = query_position - torch.arange(above + n, device=device)[None, :]
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(n, above + n, dtype=dtype, device=device)
            return mask.masked_fill(hidden, torch.finfo(dtype).min)[None, None]

        return self.compute_once((n, above, window, dtype, device), make)
