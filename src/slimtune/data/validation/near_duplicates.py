"""Rows that are alike: the same, nearly the same, the same question with another answer, the same answer everywhere.

Of each row stay 29 bytes of keys and, where its answer is long enough to judge, 128 of a signature:

    keys        [N, 3]    uint64: hashes of the row's text, of what stands before the last answer, of that answer
    signature   [N, 128]  uint8: MinHash over trigrams of tokens, 64 of the whole row and 64 of what is learned

Two rows are nearly alike if about `NEAR` of the trigrams of both, and of what both learn, are the same (Jaccard, as 64
hashes of one byte estimate it). Candidates agree in one of 16 bands of 4 (locality-sensitive hashing). Trigrams that
more than a quarter of the first rows hold (system prompts, headers, instructions) do not count, and a row with fewer
than `LEAST` others in what it learns is not judged: rows on like facts differ in one word.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NEAR = 0.8
LEAST = 16
HASHES = 64
COMMON = 0.25
SHORT = 5
"""Most words of an answer that contradicts another: of longer ones a prompt may have several."""

_BANDS = HASHES // 4
_RNG = np.random.default_rng(20_111)
_ODD = _RNG.integers(0, 2**31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_XOR = _RNG.integers(0, 2**32, HASHES, dtype=np.uint32)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def key(*texts: str) -> int:
    """Return a 64-bit hash of texts, in which white space and Unicode's spelling of a character do not count."""
    plain = "\0".join(" ".join(text.split()) for text in texts)
    plain = plain if plain.isascii() else unicodedata.normalize("NFC", plain)
    return int.from_bytes(blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def trigrams(rows: list[list[int]]) -> tuple[Array, Array]:
    """Return uint32 hashes of all trigrams of tokens, row after row, and int64 [N + 1]: where each row's begin."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    tokens = np.fromiter((t for r in rows for t in r), dtype=np.uint64, count=int(lengths.sum()))
    if len(tokens) < 3:
        return np.zeros(0, np.uint32), np.zeros(len(rows) + 1, np.int64)
    mixed = tokens[:-2] * _MIX[0] + tokens[1:-1] * _MIX[1] + tokens[2:] * _MIX[2]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX[1]
    inside = np.ones(len(tokens), dtype=bool)
    ends = np.cumsum(lengths)
    for back in (1, 2):  # a trigram does not reach into the next row
        at = ends - back
        inside[at[at >= ends - lengths]] = False
    counts = np.maximum(lengths - 2, 0)
    return (mixed[inside[:-2]] >> np.uint64(32)).astype(np.uint32), np.concatenate([[0], np.cumsum(counts)])


def common(rows: list[list[int]]) -> Array:
    """Return the trigrams, sorted, that too many of these rows hold to tell them apart."""
    hashes, starts = trigrams(rows)
    held: Counter[int] = Counter()
    for begin, end in itertools.pairwise(starts):
        held.update(set(hashes[begin:end].tolist()))
    most = max(COMMON * len(rows), 8) if len(rows) >= 8 else max(len(rows) - 1, 1)
    return np.array(sorted(h for h, n in held.items() if n > most), dtype=np.uint32)


def signatures(rows: list[list[int]], learned: list[list[bool]], known: Array) -> tuple[Array, Array]:
    """Return the signatures of rows, uint8 [N, 128], and which rows can be judged, bool [N].

    Args:
        rows: token ids.
        learned: for each token whether it is learned.
        known: trigrams that do not count.
    """
    n = len(rows)
    out = np.zeros((n, 2 * HASHES), dtype=np.uint8)
    hashes, starts = trigrams(rows)
    if not len(hashes):
        return out, np.zeros(n, dtype=bool)
    own = ~_in(hashes, known)
    said = np.fromiter(
        (a and b and c for row in learned for a, b, c in zip(row, row[1:], row[2:], strict=False)), bool, len(hashes)
    )
    counts = np.concatenate([[0], np.cumsum(own & said)])
    judged = counts[starts[1:]] - counts[starts[:-1]] >= LEAST
    if judged.any():
        wanted = np.repeat(judged, np.diff(starts))
        begins = np.concatenate([[0], np.cumsum(np.diff(starts)[judged])[:-1]])
        for half, mask in enumerate((own, own & said)):
            some, out_of = hashes[wanted], ~mask[wanted]
            for i in range(HASHES):
                values = (some ^ _XOR[i]) * _ODD[i]
                values[out_of] = 0xFFFFFFFF
                out[judged, half * HASHES + i] = np.minimum.reduceat(values, begins) & np.uint32(0xFF)
    return out, judged


def near_pairs(a: Array, b: Array | None = None) -> tuple[Array, Array]:
    """Return which rows of `b` are nearly alike a row of `a`, and which that is: int64 [P] twice, each of `b` once.

    Args:
        a: signatures uint8 [N, 128].
        b: signatures; None: those of `a`, each to be compared with earlier ones.
    """
    within = b is None
    b = a if b is None else b
    found = np.full(len(b), -1, dtype=np.int64)
    if not len(a):
        return found[:0], found[:0]
    numbers = np.arange(len(b))
    for band in range(_BANDS):
        ka, kb = _band(a, band), _band(b, band)
        order = np.argsort(ka, kind="stable")
        ranked = ka[order]
        first = np.minimum(np.searchsorted(ranked, kb), len(a) - 1)  # the earliest row with this band
        if within:  # and the one before, where the earliest is another text
            rank = np.empty(len(a), dtype=np.int64)
            rank[order] = numbers
            tried = (first, np.maximum(rank - 1, 0))
        else:
            tried = (first, np.maximum(np.searchsorted(ranked, kb, side="right") - 1, 0))
        for place in tried:
            other = order[place]
            open_ = (found < 0) & (ka[other] == kb)
            if within:
                open_ &= other < numbers
            rows = np.flatnonzero(open_)
            for at in range(0, len(rows), 65_536):  # so that what is compared stays small
                some = rows[at : at + 65_536]
                equal = a[other[some]] == b[some]
                near = (_jaccard(equal[:, :HASHES]) >= NEAR) & (_jaccard(equal[:, HASHES:]) >= NEAR)
                found[some[near]] = other[some[near]]
    return (rows := np.flatnonzero(found >= 0)), found[rows]


def repeats(values: Array) -> tuple[Array, Array]:
    """Return which values stood earlier already, and where they stood first: int64 [R] twice."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(values)))
    return again, first[inverse[again]]


def _jaccard(equal: Array) -> Array:
    chance = 1 / 256  # that two bytes are the same
    return (equal.mean(axis=1, dtype=np.float32) - chance) / (1 - chance)


def _band(signature: Array, band: int) -> Array:
    return np.ascontiguousarray(signature[:, 4 * band : 4 * band + 4]).view(np.uint32).ravel()


def _in(hashes: Array, known: Array) -> Array:
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
