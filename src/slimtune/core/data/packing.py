"""Packing rows into one sequence without padding: which rows go together, and how a shared prefix is stored once.

    pack_into_one_sequence   rows → one sequence of segments, a tree: a prefix that rows share is one segment above them
    bin_pack_example_indices  examples, of one or several rows → groups with at most so many packed tokens each

The hidden state of a token depends only on the row up to it, so a shared prefix is computed once for all its rows. The
first supervised token of a row may be predicted by the last token of a shared segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..attention.packed_layout import PackedLayout
from ..foundation.sequences import count_common_prefix
from .example_lengths import MIN_SHARED_TOKENS, Tokens

_WINDOW = 256
"""Examples that `bin_pack_example_indices` compares with one another, because the time grows with its square."""
_BALANCE_TRIALS, _BALANCED = 4, 1.05
"""Most limits tried to balance groups, and how much above the mean the largest may be."""


@dataclass(frozen=True)
class _PackedSequence:
    """Rows in one sequence."""

    tokens: list[int]
    layout: PackedLayout
    segments: list[list[tuple[int, int]]]  # of each row, in the order given: (first column, tokens)

    def get_token_indices(self, row: int) -> list[int]:
        """Return the column of each token of a row."""
        return [start + t for start, n in self.segments[row] for t in range(n)]


def pack_into_one_sequence(rows: Sequence[Tokens], *, share_prefix: bool = True) -> _PackedSequence:
    """Put rows into one sequence; a shared prefix of at least `MIN_SHARED_TOKENS` tokens is stored once."""
    tokens: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    segments: list[list[tuple[int, int]]] = [[] for _ in rows]

    def add_segment(segment: Tokens, parent: int, members: Sequence[int]) -> int:
        for row in members:
            segments[row].append((len(tokens), len(segment)))
        tokens.extend(segment)
        lengths.append(len(segment))
        parents.append(parent)
        return len(lengths) - 1

    def add_subtree(members: list[int], depth: int, parent: int) -> None:
        """Add sorted rows that agree in their first `depth` tokens, which are in the sequence already."""
        for group in _groups_with_prefix(rows, members, depth):
            first, last = rows[group[0]], rows[group[-1]]
            if len(group) > 1:  # sorted rows: what the first and the last share, all share
                end = count_common_prefix(first, last, depth)
                add_subtree(group, end, add_segment(first[depth:end], parent, group))
            elif len(first) > depth:
                add_segment(first[depth:], parent, group)

    if share_prefix:
        add_subtree(sorted(range(len(rows)), key=lambda r: list(rows[r])), 0, -1)
    else:
        for r, row in enumerate(rows):
            add_segment(row, -1, [r])
    return _PackedSequence(tokens, PackedLayout(tuple(lengths), tuple(parents)), segments)


def bin_pack_example_indices(
    examples: Sequence[Sequence[Tokens]], max_tokens: int | None, *, share_prefix: bool = True
) -> list[list[int]]:
    """Return groups of example numbers, each of at most `max_tokens` packed tokens; a longer example is alone.

    The rows of an example stay together. It goes into the group that shares most of its prefix, then into the fullest
    one. The groups are then balanced: no more of them, but of about the same size, as the largest takes most memory.
    None: one group.
    """
    if max_tokens is None:
        return [list(range(len(examples)))]
    # Sorted, neighbours have the longest common prefixes, so each window sees the rows that share most.
    order = list(range(len(examples)))
    if share_prefix:
        order.sort(key=lambda e: list(examples[e][0]))
    windows = [order[at : at + _WINDOW] for at in range(0, len(order), _WINDOW)]
    return [sorted(group) for window in windows for group in _balance(examples, window, max_tokens, share_prefix)]


def _balance(
    examples: Sequence[Sequence[Tokens]], members: list[int], max_tokens: int, share_prefix: bool
) -> list[list[int]]:
    """Return best-fit groups under the lowest limit found that makes neither more groups nor more tokens."""
    best, sizes = _best_fit(examples, members, max_tokens, share_prefix)
    low = -(-sum(sizes) // len(sizes))
    for _ in range(_BALANCE_TRIALS):
        if max(sizes) <= low * _BALANCED:
            break
        limit = (low + max(sizes)) // 2
        groups, tried = _best_fit(examples, members, limit, share_prefix)
        if len(tried) > len(sizes) or sum(tried) > sum(sizes) or max(tried) >= max(sizes):
            low = limit
        else:
            best, sizes = groups, tried
    return best


def _best_fit(
    examples: Sequence[Sequence[Tokens]], members: list[int], max_tokens: int, share_prefix: bool
) -> tuple[list[list[int]], list[int]]:
    """Return groups and the packed tokens of each."""
    groups: list[list[int]] = []
    used: list[int] = []
    alone = {
        e: len(rows[0]) if len(rows) == 1 else len(pack_into_one_sequence(rows, share_prefix=share_prefix).tokens)
        for e, rows in ((e, examples[e]) for e in members)
    }
    for example in sorted(members, key=lambda e: -alone[e]):
        first, saved = examples[example][0], [0] * len(groups)
        if share_prefix:
            shared = [max(count_common_prefix(first, examples[other][0]) for other in group) for group in groups]
            saved = [n if n >= MIN_SHARED_TOKENS else 0 for n in shared]
        size = [n + alone[example] - s for n, s in zip(used, saved, strict=True)]
        for g in sorted(range(len(groups)), key=lambda g: (-saved[g], -used[g])):
            if size[g] > max_tokens:
                continue
            # Below a branch, rows that share less than MIN_SHARED_TOKENS do not share them: measure exactly.
            rows = sum(len(examples[e]) for e in groups[g]) + len(examples[example]) - 1
            if share_prefix and size[g] + (MIN_SHARED_TOKENS - 1) * rows > max_tokens:
                together = [row for e in (*groups[g], example) for row in examples[e]]
                size[g] = len(pack_into_one_sequence(together).tokens)
            if size[g] <= max_tokens:
                groups[g].append(example)
                used[g] = size[g]
                break
        else:
            groups.append([example])
            used.append(alone[example])
    return groups, used


def _groups_with_prefix(rows: Sequence[Tokens], members: list[int], depth: int) -> Iterator[list[int]]:
    """Yield runs of sorted rows whose neighbours share at least `MIN_SHARED_TOKENS` tokens after `depth`."""
    run = [members[0]]
    for row in members[1:]:
        if count_common_prefix(rows[run[-1]], rows[row], depth) - depth >= MIN_SHARED_TOKENS:
            run.append(row)
        else:
            yield run
            run = [row]
    yield run
