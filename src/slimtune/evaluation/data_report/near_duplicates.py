"""Rows that are alike: the same row, nearly the same, the same prompt with another answer, the same answer everywhere.

Of each row, 24 bytes of hashes are kept and, if its answer is long enough to compare, 128 bytes of a signature:

    hashes      [N, 3]    uint64: of the row's text, of the text before the last answer, of that answer
    signature   [N, 128]  uint8: MinHash over trigrams of tokens, 64 values of the whole row and 64 of its answer

Two rows are near duplicates if about `THRESHOLD` of their trigrams are the same (Jaccard similarity, estimated from the
64 hashes), in the whole rows and in their answers. Candidates agree in one of 16 bands of 4 bytes (locality-sensitive
hashing), which sorting finds. (datasketch's `MinHash` and `MinHashLSH` take 2 KB and 0.3 ms a row: 2 GB and 5 minutes
for a million rows.)
Trigrams that more than a quarter of the first rows have (system prompts, headers) do not count. A row whose answer has
fewer than `MIN_TRIGRAMS` others is not compared, because rows about similar facts differ in one word.
"""

import unicodedata
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

THRESHOLD = 0.8
MIN_TRIGRAMS = 16
HASHES = 64
COMMON_SHARE = 0.25
SHORT_ANSWER = 5
"""Most words of an answer that can contradict another; a prompt may have several longer answers."""

_BAND_BYTES = 4
_RNG = np.random.default_rng(20_111)
_ODD = _RNG.integers(0, 2**31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_XOR = _RNG.integers(0, 2**32, HASHES, dtype=np.uint32)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
"""Odd numbers, so that the order of what they multiply matters to the sum."""
_CHUNK = 65_536
"""Pairs of signatures that are compared at once."""


def hash_whitespace_normalized_texts(*texts: str) -> int:
    """Return a 64-bit hash of texts; white space and Unicode's spelling of a character do not count."""
    normal = "\0".join(" ".join(text.split()) for text in texts)
    normal = normal if normal.isascii() else unicodedata.normalize("NFC", normal)
    return int.from_bytes(blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def combine_three_hashes(first: Array, second: Array, third: Array) -> Array:
    """Return a hash of three values in their order, uint64 [N] each."""
    return first * _MIX[0] + second * _MIX[1] + third * _MIX[2]


def _hash_trigrams(rows: list[list[int]]) -> tuple[Array, Array]:
    """Return uint32 hashes of the trigrams of all rows, one row after another, and int64 [N + 1]: where each begins."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    tokens = np.fromiter((t for r in rows for t in r), dtype=np.uint64, count=int(lengths.sum()))
    if len(tokens) < 3:
        return np.zeros(0, np.uint32), np.zeros(len(rows) + 1, np.int64)
    mixed = combine_three_hashes(tokens[:-2], tokens[1:-1], tokens[2:])
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX[1]
    inside = np.ones(len(tokens), dtype=bool)
    ends = np.cumsum(lengths)
    for back in (1, 2):  # no trigram crosses into the next row
        last = ends - back
        inside[last[last >= ends - lengths]] = False
    counts = np.maximum(lengths - 2, 0)
    return (mixed[inside[:-2]] >> np.uint64(32)).astype(np.uint32), np.concatenate([[0], np.cumsum(counts)])


def find_common_trigram_hashes(token_ids_by_row: list[list[int]]) -> Array:
    """Return the hashes, sorted, of the trigrams that more than `COMMON_SHARE` of these rows have."""
    hashes, starts = _hash_trigrams(token_ids_by_row)
    owners = np.repeat(np.arange(len(token_ids_by_row), dtype=np.uint64), np.diff(starts))
    once_per_row = np.unique(owners << np.uint64(32) | hashes).astype(np.uint32)  # the lower half is the hash
    values, counts = np.unique(once_per_row, return_counts=True)
    return values[
        counts
        > (
            max(COMMON_SHARE * len(token_ids_by_row), 8)
            if len(token_ids_by_row) >= 8
            else max(len(token_ids_by_row) - 1, 1)
        )
    ]


def compute_minhash_and_comparable_mask(
    token_ids_by_row: list[list[int]], supervised: list[list[bool]], common_trigram_hashes: Array
) -> tuple[Array, Array]:
    """Return the MinHash signatures of token ids, uint8 [N, 128], and which rows can be compared, bool [N].

    `common_trigram_hashes` are the sorted hashes of trigrams that do not count.
    """
    signatures = np.zeros((len(token_ids_by_row), 2 * HASHES), dtype=np.uint8)
    hashes, starts = _hash_trigrams(token_ids_by_row)
    if not len(hashes):
        return signatures, np.zeros(len(token_ids_by_row), dtype=bool)
    counted = np.ones(len(hashes), dtype=bool)
    if len(common_trigram_hashes):
        counted = (
            common_trigram_hashes[
                np.minimum(np.searchsorted(common_trigram_hashes, hashes), len(common_trigram_hashes) - 1)
            ]
            != hashes
        )
    masks = [np.array(row, dtype=bool) for row in supervised]
    in_answer = counted & np.concatenate([m[:-2] & m[1:-1] & m[2:] for m in masks])
    totals = np.concatenate([[0], np.cumsum(in_answer)])
    comparable = totals[starts[1:]] - totals[starts[:-1]] >= MIN_TRIGRAMS
    if comparable.any():
        selected = np.repeat(comparable, np.diff(starts))
        begins = np.concatenate([[0], np.cumsum(np.diff(starts)[comparable])[:-1]])
        for half, mask in enumerate((counted, in_answer)):
            values, ignored = hashes[selected], ~mask[selected]
            for i in range(HASHES):
                permuted = (values ^ _XOR[i]) * _ODD[i]
                permuted[ignored] = 0xFFFFFFFF
                signatures[comparable, half * HASHES + i] = np.minimum.reduceat(permuted, begins) & np.uint32(0xFF)
    return signatures, comparable


def match_minhash_signatures(signatures: Array, other_signatures: Array | None = None) -> tuple[Array, Array]:
    """Return which of the other rows nearly repeat a row, and which one: int64 [P] twice, each other row once.

    Both are uint8 [N, 128]. Without `other_signatures`, rows are compared with earlier ones.
    """
    within, other_signatures = other_signatures is None, signatures if other_signatures is None else other_signatures
    match, numbers = np.full(len(other_signatures), -1, dtype=np.int64), np.arange(len(other_signatures))
    for first_byte in range(0, HASHES if len(signatures) else 0, _BAND_BYTES):
        band = slice(first_byte, first_byte + _BAND_BYTES)
        keys_a, keys_b = (
            np.ascontiguousarray(some[:, band]).view(np.uint32).ravel() for some in (signatures, other_signatures)
        )
        order = np.argsort(keys_a, kind="stable")
        ranked = keys_a[order]
        # Two candidates of the same band: the first row, and the last one (of the same file: the one before).
        first = np.minimum(np.searchsorted(ranked, keys_b), len(signatures) - 1)
        if within:
            last = np.empty(len(signatures), dtype=np.int64)
            last[order] = numbers - 1
        else:
            last = np.searchsorted(ranked, keys_b, side="right") - 1
        for place in (first, np.maximum(last, 0)):
            candidate = order[place]
            undecided = (match < 0) & (keys_a[candidate] == keys_b)
            if within:
                undecided &= candidate < numbers
            rows = np.flatnonzero(undecided)
            for at in range(0, len(rows), _CHUNK):
                some = rows[at : at + _CHUNK]
                equal = signatures[candidate[some]] == other_signatures[some]
                near = np.minimum(_jaccard(equal[:, :HASHES]), _jaccard(equal[:, HASHES:])) >= THRESHOLD
                match[some[near]] = candidate[some[near]]
    rows = np.flatnonzero(match >= 0)
    return rows, match[rows]


def _jaccard(equal: Array) -> Array:
    chance = 1 / 256  # that two different bytes are the same
    return (equal.mean(axis=1, dtype=np.float32) - chance) / (1 - chance)


def find_repeat_and_first_positions(values: Array) -> tuple[Array, Array]:
    """Return the positions of values that occurred before, and where each occurred first: int64 [R] twice."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(values)))
    return again, first[inverse[again]]
