"""Tokenized rows in an Arrow file outside memory, which the operating system pages in and out."""

import hashlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..utils.files import translate_os_errors

Example = dict[str, Any]
"""`{"input_ids": [L], "labels": [L], "line": int}`; a label is its token, or `IGNORE_INDEX` if it is not learned."""
IGNORE_INDEX = -100


class TokenizedDataset(Sequence[Example]):
    """Tokenized rows, read from an Arrow table with the columns of `DatasetWriter` as they are asked for.

    `indices` are the rows of the table that are part of the dataset, int64 [N]; None: all.
    """

    def __init__(self, table: Any, indices: np.ndarray | None = None) -> None:
        self._table = table
        self._indices = np.arange(table.num_rows) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Return one example, or a list of them for a slice."""
        found = self._indices[index]
        return list(map(self._read, found)) if isinstance(index, slice) else self._read(found)

    def __iter__(self) -> Iterator[Example]:
        return map(self._read, self._indices)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, int64 [N]."""
        chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in self._table["input_ids"].chunks]
        return np.concatenate([np.zeros(0, np.int64), *chunks])[self._indices]

    def select(self, indices: np.ndarray) -> "TokenizedDataset":
        """Return the dataset of these rows, in this order; nothing is copied."""
        return TokenizedDataset(self._table, self._indices[indices])

    def digest(self) -> str:
        """Return the SHA-256 of the tokens, of which of them are learned, and of their order."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for i in self._indices:
            ids, supervised = self._read_arrays(i)
            digest.update(np.where(supervised, ~ids, ids).tobytes())
        return digest.hexdigest()

    def _read(self, index: int) -> Example:
        ids, supervised = self._read_arrays(index)
        labels = np.where(supervised, ids, IGNORE_INDEX)
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "line": self._table["line"][index].as_py()}

    def _read_arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, supervised = (self._table[name][index].values for name in ("input_ids", "supervised"))
        return ids.to_numpy(), supervised.to_numpy(zero_copy_only=False)


class DatasetWriter:
    """Writes tokenized rows into a temporary file without a name: nothing of it is left after a crash.

    An objective that needs more of a row (a class, the group of a pair) adds a column here.
    """

    def __init__(self) -> None:
        import pyarrow as pa  # 50 MB that the processes that tokenize do not need
        from pyarrow import ipc

        self._arrow = pa
        columns = {"input_ids": pa.list_(pa.int32()), "supervised": pa.list_(pa.bool_()), "line": pa.int64()}
        self._schema = pa.schema(columns)
        self._file = tempfile.TemporaryFile(prefix="slimtune-rows-")  # noqa: SIM115 closed by __exit__
        self._stream = ipc.new_stream(pa.PythonFile(self._file, "w"), self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # the memory map of it stays valid

    def write(self, ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, lines: np.ndarray) -> None:
        """Write rows: their tokens one after another, int32 [T] and bool [T]; tokens and line of each, int64 [N]."""
        offsets = self._arrow.array(np.concatenate([[0], np.cumsum(lengths)]), self._arrow.int32())
        lists = [self._arrow.ListArray.from_arrays(offsets, self._arrow.array(a)) for a in (ids, supervised)]
        batch = self._arrow.record_batch([*lists, self._arrow.array(lines)], self._schema)
        path = Path(tempfile.gettempdir()) / "slimtune-rows"
        with translate_os_errors(path, batch.nbytes, "let TMPDIR name a folder on another disk"):
            self._stream.write_batch(batch)
            self._file.flush()

    def finish(self) -> TokenizedDataset:
        """Return all written rows as a dataset."""
        self._stream.close()
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return TokenizedDataset(self._arrow.ipc.open_stream(self._arrow.py_buffer(mapped)).read_all())
