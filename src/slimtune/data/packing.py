"""How rows come to lie in one sequence: which rows go together, and what they begin with laid once.

    lay       rows → segments, a tree of beginnings: a beginning that several rows share is one segment above theirs
    divided   rows → packs with room for so many tokens each: best fit, where a row fits best in the pack that already
              holds most of its beginning, then in the fullest

A token's hidden state depends on the row up to it alone, so a shared beginning is computed once, whoever learns from
it: a row's first supervised token may well be predicted from a shared segment's last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..attention.packed_layout import PackedLayout

Tokens = Sequence[int]

LEAST = 8
"""Shortest beginning that is laid once: attention is computed by segment, and a segment costs a little."""
_WINDOW = 256
"""Rows that are looked at together when they are divided: the time this takes grows with its square."""


@dataclass(frozen=True)
class PackedSequence:
    """Rows in one sequence.

    Args:
        tokens: the sequence.
        layout: its segments.
        pieces: for each row, in the order given, its segments: `(first column, tokens)`.
    """

    tokens: list[int]
    layout: PackedLayout
    pieces: list[list[tuple[int, int]]]

    def columns(self, row: int) -> list[int]:
        """Return where each of a row's tokens lies."""
        return [start + t for start, n in self.pieces[row] for t in range(n)]


def pack_sequences(rows: Sequence[Tokens], *, share: bool = True) -> PackedSequence:
    """Lay rows in one sequence, shared beginnings of `LEAST` tokens and more once."""
    tokens: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    pieces: list[list[tuple[int, int]]] = [[] for _ in rows]

    def segment(of: Tokens, parent: int, members: Sequence[int]) -> int:
        for row in members:
            pieces[row].append((len(tokens), len(of)))
        tokens.extend(of)
        lengths.append(len(of))
        parents.append(parent)
        return len(lengths) - 1

    def branch(members: list[int], depth: int, parent: int) -> None:
        """Lay rows that agree in their first `depth` tokens, which lie already."""
        for group in _alike(rows, members, depth):
            first, last = rows[group[0]], rows[group[-1]]
            if len(group) == 1:
                if len(first) > depth:
                    segment(first[depth:], parent, group)
            else:  # sorted: what the first and the last share, all share
                end = _common(first, last, depth)
                branch(group, end, segment(first[depth:end], parent, group))

    if share:
        branch(sorted(range(len(rows)), key=lambda r: list(rows[r])), 0, -1)
    else:
        for r, row in enumerate(rows):
            segment(row, -1, [r])
    return PackedSequence(tokens, PackedLayout(tuple(lengths), tuple(parents)), pieces)


def bin_pack(rows: Sequence[Tokens], room: int | None, *, share: bool = True) -> list[list[int]]:
    """Return packs of row numbers, each of at most `room` tokens as laid; a longer row goes alone. None: one pack."""
    if room is None:
        return [list(range(len(rows)))]
    # Neighbours in this order begin alike, so that what is looked at together shares most.
    order = sorted(range(len(rows)), key=lambda r: list(rows[r])) if share else list(range(len(rows)))
    packs: list[list[int]] = []
    for at in range(0, len(order), _WINDOW):
        packs += _best_fit(rows, order[at : at + _WINDOW], room, share)
    return [sorted(p) for p in packs]


def _best_fit(rows: Sequence[Tokens], some: list[int], room: int, share: bool) -> list[list[int]]:
    packs: list[list[int]] = []
    used: list[int] = []
    for row in sorted(some, key=lambda r: -len(rows[r])):
        saved = [max((_shared(rows[row], rows[other]) for other in pack), default=0) if share else 0 for pack in packs]
        size = [n + len(rows[row]) - s for n, s in zip(used, saved, strict=True)]
        for p in sorted(range(len(packs)), key=lambda p: (-saved[p], -used[p])):
            if size[p] > room:
                continue
            # What two rows share below `LEAST` behind a branch is laid for each.
            if share and size[p] + (LEAST - 1) * len(packs[p]) > room:
                size[p] = len(pack_sequences([rows[r] for r in (*packs[p], row)]).tokens)
            if size[p] <= room:
                packs[p].append(row)
                used[p] = size[p]
                break
        else:
            packs.append([row])
            used.append(len(rows[row]))
    return packs


def _shared(a: Tokens, b: Tokens) -> int:
    n = _common(a, b, 0)
    return n if n >= LEAST else 0


def _common(a: Tokens, b: Tokens, start: int) -> int:
    """Return how many first tokens two rows share, `start` of them known to be."""
    n, most = start, min(len(a), len(b))
    if a[n:most] == b[n:most]:
        return most
    while n < most:  # slices are compared much faster than tokens
        middle = (n + most + 1) // 2
        if a[n:middle] == b[n:middle]:
            n = middle
        else:
            most = middle - 1
    return n


def _alike(rows: Sequence[Tokens], members: list[int], depth: int) -> Iterator[list[int]]:
    """Yield runs of sorted rows of which neighbours share `LEAST` tokens and more beyond `depth`."""
    run = [members[0]]
    for row in members[1:]:
        if _common(rows[run[-1]], rows[row], depth) - depth >= LEAST:
            run.append(row)
        else:
            yield run
            run = [row]
    yield run
