"""One hash of a dataset's rows: their tokens, which of them are learned, their classes and scores, and their order.

A row is its number of tokens as an int64, its tokens as int32 (`~id` where a token is learned), and the texts of its
classes and scores. Rows are gathered in blocks from the table's memory, since a file may have millions of short ones.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from ..core.data.tokenized_dataset import TokenizedDataset

BLOCK_ROWS = 1 << 16
_LENGTH_INTS = 2  # int32 values that an int64 takes


def hash_rows(dataset: TokenizedDataset) -> str:
    """Return the SHA-256 of a dataset's rows, in hexadecimal digits.

    Windows of documents and selections of answers have the hash of the rows that they are taken from.
    """
    digest = hashlib.sha256()
    table, indices = dataset.table, dataset.indices
    has_texts = any(table[name].null_count < table.num_rows for name in ("classes", "row_scores"))
    starts = np.cumsum([0, *(len(chunk) for chunk in table["input_ids"].chunks)])
    chunks = [
        (
            ids.offsets.to_numpy(),
            ids.values.to_numpy(),
            np.frombuffer(supervised.values.buffers()[1] or b"", np.uint8),
            supervised.values.offset,
        )
        for ids, supervised in zip(table["input_ids"].chunks, table["supervised"].chunks, strict=True)
    ]
    for begin in range(0, len(indices), BLOCK_ROWS):
        rows = indices[begin : begin + BLOCK_ROWS]
        numbers, ends = _gather_rows(rows, starts, chunks)
        if not has_texts:
            digest.update(numbers.tobytes())
            continue
        for part, text in zip(np.split(numbers, ends[:-1]), _list_texts(table, rows), strict=True):
            digest.update(part.tobytes() + text)
    return digest.hexdigest()


def _gather_rows(rows: np.ndarray, starts: np.ndarray, chunks: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths and tokens of rows, one after another as int32, and where each row ends."""
    owners = np.searchsorted(starts, rows, "right") - 1
    order = np.argsort(owners, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owners[order])) + 1) if len(rows) else []
    froms, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for group in groups:
        offsets, own = chunks[owners[group[0]]][0], rows[group] - starts[owners[group[0]]]
        froms[group] = offsets[own]
        lengths[group] = offsets[own + 1] - offsets[own]
    ends = np.cumsum(lengths + _LENGTH_INTS)
    numbers = np.empty(ends[-1] if len(rows) else 0, np.int32)
    heads = ends - lengths - _LENGTH_INTS
    numbers[heads], numbers[heads + 1] = lengths & 0xFFFFFFFF, lengths >> 32
    for group in groups:
        _, ids, bits, bit_offset = chunks[owners[group[0]]]
        counts = lengths[group]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        source = np.repeat(froms[group], counts) + steps
        at = source + bit_offset
        is_supervised = (bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1
        numbers[np.repeat(heads[group] + _LENGTH_INTS, counts) + steps] = ids[source] ^ -is_supervised.astype(np.int32)
    return numbers, ends


def _list_texts(table: object, rows: np.ndarray) -> Iterator[bytes]:
    """Return the classes and the scores of each row as text."""
    classes, scores = (table[name].take(rows).to_pylist() for name in ("classes", "row_scores"))  # type: ignore[index]
    for names, values in zip(classes, scores, strict=True):
        yield ("\0".join(names or []) + str(values or "")).encode()
