"""Packing rows into one sequence without padding: which rows go together, and how a shared prefix is stored once.

    pack_sequences   rows → one sequence of segments, a tree: a prefix that several rows share is one segment above them
    bin_pack         rows → groups with at most so many packed tokens each

The hidden state of a token depends only on the row up to it, so a shared prefix is computed once for all its rows. The
first supervised token of a row may be predicted by the last token of a shared segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..attention.packed_layout import PackedLayout
from ..utils.sequences import common_prefix_length

Tokens = Sequence[int]

MIN_SHARED_TOKENS = 8
"""Shortest prefix that is stored once. Attention is computed by segment, and every segment costs a little."""
_WINDOW = 256
"""Rows that `bin_pack` compares with one another, because the time grows with its square."""


@dataclass(frozen=True)
class PackedSequence:
    """Rows in one sequence."""

    tokens: list[int]
    layout: PackedLayout
    segments: list[list[tuple[int, int]]]  # of each row, in the order given: (first column, tokens)

    def get_token_indices(self, row: int) -> list[int]:
        """Return the column of each token of a row."""
        return [start + t for start, n in self.segments[row] for t in range(n)]


def pack_sequences(rows: Sequence[Tokens], *, share_prefix: bool = True) -> PackedSequence:
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
                end = common_prefix_length(first, last, depth)
                add_subtree(group, end, add_segment(first[depth:end], parent, group))
            elif len(first) > depth:
                add_segment(first[depth:], parent, group)

    if share_prefix:
        add_subtree(sorted(range(len(rows)), key=lambda r: list(rows[r])), 0, -1)
    else:
        for r, row in enumerate(rows):
            add_segment(row, -1, [r])
    return PackedSequence(tokens, PackedLayout(tuple(lengths), tuple(parents)), segments)


def bin_pack(rows: Sequence[Tokens], max_tokens: int | None, *, share_prefix: bool = True) -> list[list[int]]:
    """Return groups of row numbers, each of at most `max_tokens` packed tokens; a longer row is a group of its own.

    A row goes into the group that shares most of its prefix, then into the fullest one. None: one group.
    """
    if max_tokens is None:
        return [list(range(len(rows)))]
    # Sorted, neighbours have the longest common prefixes, so each window sees the rows that share most.
    order = sorted(range(len(rows)), key=lambda r: list(rows[r])) if share_prefix else list(range(len(rows)))
    windows = [order[at : at + _WINDOW] for at in range(0, len(order), _WINDOW)]
    return [sorted(group) for window in windows for group in _best_fit(rows, window, max_tokens, share_prefix)]


def _best_fit(rows: Sequence[Tokens], members: list[int], max_tokens: int, share_prefix: bool) -> list[list[int]]:
    groups: list[list[int]] = []
    used: list[int] = []
    for row in sorted(members, key=lambda r: -len(rows[r])):
        saved = [0] * len(groups)
        if share_prefix:
            shared = [max(common_prefix_length(rows[row], rows[other]) for other in group) for group in groups]
            saved = [n if n >= MIN_SHARED_TOKENS else 0 for n in shared]
        size = [n + len(rows[row]) - s for n, s in zip(used, saved, strict=True)]
        for g in sorted(range(len(groups)), key=lambda g: (-saved[g], -used[g])):
            if size[g] > max_tokens:
                continue
            # Below a branch, rows that share less than MIN_SHARED_TOKENS do not share them: measure exactly.
            if share_prefix and size[g] + (MIN_SHARED_TOKENS - 1) * len(groups[g]) > max_tokens:
                size[g] = len(pack_sequences([rows[r] for r in (*groups[g], row)]).tokens)
            if size[g] <= max_tokens:
                groups[g].append(row)
                used[g] = size[g]
                break
        else:
            groups.append([row])
            used.append(len(rows[row]))
    return groups


def _groups_with_prefix(rows: Sequence[Tokens], members: list[int], depth: int) -> Iterator[list[int]]:
    """Yield runs of sorted rows whose neighbours share at least `MIN_SHARED_TOKENS` tokens after `depth`."""
    run = [members[0]]
    for row in members[1:]:
        if common_prefix_length(rows[run[-1]], rows[row], depth) - depth >= MIN_SHARED_TOKENS:
            run.append(row)
        else:
            yield run
            run = [row]
    yield run
