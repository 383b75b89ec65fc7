"""Tokenized rows in an Arrow file outside memory, which the operating system pages in and out."""

import copy
import itertools
import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..foundation.files import translate_os_errors
from ..foundation.sequences import IGNORE_INDEX, count_common_prefix
from .example_lengths import MIN_SHARED_TOKENS, DatasetRowComposition, ExampleLength, measure_example_length
from .example_types import Example

SAMPLED_ROWS = 256


def list_tokens_and_labels_by_row(example: Example) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each row of an example."""
    if "row_lengths" not in example:
        return [(example["input_ids"], example["labels"])]
    ends = list(itertools.accumulate(example["row_lengths"]))
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [(example["input_ids"][part], example["labels"][part]) for part in parts]


class TokenizedDataset(Sequence[Example]):
    """Tokenized rows, read from an Arrow table with the columns of `TemporaryTokenizedDatasetWriter` when asked for.

    `indices` are the rows of the table that are part of the dataset, int64 [N]; None: all. `columns` are more values of
    these examples, arrays [N, …] by the key that an example gets.
    """

    def __init__(
        self, table: Any, indices: np.ndarray | None = None, extra_columns: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.table = table
        self.indices = np.arange(table.num_rows) if indices is None else indices
        self._columns = dict(extra_columns or {})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """Return one example, or a list of them for a slice."""
        found = range(len(self))[index]
        return list(map(self.read, found)) if isinstance(found, range) else self.read(found)

    def __iter__(self) -> Iterator[Example]:
        return map(self.read, range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [N]."""
        chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in self.table["input_ids"].chunks]
        return np.concatenate([np.zeros(0, np.int64), *chunks])[self.indices]

    @property
    def example_lengths(self) -> list[ExampleLength]:
        """The length of each example (core/data/example_lengths.py)."""
        if self.table["row_lengths"].null_count == self.table.num_rows:
            return list(self.lengths.tolist())
        return [measure_example_length([ids for ids, _ in list_tokens_and_labels_by_row(e)]) for e in self]

    @property
    def content(self) -> DatasetRowComposition:
        """What the rows are made of, from `SAMPLED_ROWS` at even distances; the longest share the prefix, too."""
        sample = [self.read(i) for i in range(0, len(self), -(-len(self) // SAMPLED_ROWS) or 1)]
        supervised = [label != IGNORE_INDEX for example in sample for label in example["labels"]]
        first = sample[0]["input_ids"] if sample and not any("row_lengths" in example for example in sample) else []
        sample += map(self.read, np.argsort(-self.lengths, kind="stable")[:SAMPLED_ROWS].tolist())
        shared = min((count_common_prefix(first, example["input_ids"]) for example in sample), default=0)
        share = sum(supervised) / len(supervised) if any(supervised) else 1.0
        return DatasetRowComposition(shared if shared >= MIN_SHARED_TOKENS else 0, share)

    @property
    def lines(self) -> list[int]:
        """The line of each example in its file."""
        lines: list[int] = self.table["line"].to_numpy()[self.indices].tolist()
        return lines

    @property
    def documents(self) -> "TokenizedDataset":
        """The whole rows, if the examples are windows of them (`RowFormat.window_cutter`), else the dataset itself."""
        return self

    @property
    def owners(self) -> np.ndarray:
        """The number of each example's row among `documents`, int64 [N]."""
        return np.arange(len(self))

    def for_epoch(self, epoch: int) -> "TokenizedDataset":
        """Return the examples of an epoch, as many as of any other: the same ones, unless they are windows."""
        return self

    def shuffle(self, permute: Callable[[int], Any]) -> list[int]:
        """Return the order of the examples in an epoch; `permute(n)` draws an array of the numbers up to n."""
        order: list[int] = permute(len(self)).tolist()
        return order

    @property
    def classes(self) -> list[list[str]]:
        """Names of the classes of each example."""
        return [names or [] for names in self.table["classes"].take(self.indices).to_pylist()]

    def select(self, indices: np.ndarray) -> "TokenizedDataset":
        """Return the dataset of these examples, in this order; no token is copied."""
        columns = {name: values[indices] for name, values in self._columns.items()}
        return TokenizedDataset(self.table, self.indices[indices], columns)

    def with_columns(self, **columns: np.ndarray) -> Self:
        """Return the dataset with more values of each example, arrays [N, …]."""
        assert all(len(values) == len(self) for values in columns.values())
        found = copy.copy(self)
        found._columns = {**self._columns, **columns}
        return found

    def hashes(self) -> list[int]:
        """Return a hash of the tokens of each row, which is the same in every process."""
        return [hash(tuple(self._read_arrays(i)[0].tolist())) for i in self.indices]  # of integers: not salted

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return one example, or its tokens from `start` to `end`."""
        index = self.indices[number]
        ids, supervised = (values[start:end] for values in self._read_arrays(index))
        labels = np.where(supervised, ids, IGNORE_INDEX)
        row_lengths, row_scores = (self.table[name][index].as_py() for name in ("row_lengths", "row_scores"))
        return {
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "line": self.table["line"][index].as_py(),
            **({"row_lengths": row_lengths} if row_lengths else {}),
            **({"row_scores": row_scores} if row_scores else {}),
            **{name: values[number].tolist() for name, values in self._columns.items()},
        }

    def _read_arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, supervised = (self.table[name][index].values for name in ("input_ids", "supervised"))
        return ids.to_numpy(), supervised.to_numpy(zero_copy_only=False)


class RankedAnswerSelection(TokenizedDataset):
    """Some answers of each preference pair or ranked list, by their ranks, 0 for the best.

    `(0,)` are the chosen answers as single rows, `(0, -1)` pairs of the best and the worst answer.
    """

    def __init__(self, examples: TokenizedDataset, answer_ranks: tuple[int, ...]) -> None:
        super().__init__(examples.table, examples.indices, examples._columns)
        self.answer_ranks = answer_ranks

    @property
    def lengths(self) -> np.ndarray:
        rows = self.table["row_lengths"].take(self.indices).to_pylist()
        return np.array([sum(lengths[place] for place in self.answer_ranks) for lengths in rows], np.int64)

    def select(self, indices: np.ndarray) -> "RankedAnswerSelection":
        return RankedAnswerSelection(super().select(indices), self.answer_ranks)

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        example = super().read(number)
        answers = list_tokens_and_labels_by_row(example)
        rows = [answers[place] for place in self.answer_ranks]
        example = {k: v for k, v in example.items() if k not in ("row_lengths", "row_scores")}
        for i, key in enumerate(("input_ids", "labels")):
            example[key] = [token for row in rows for token in row[i]]
        return example | ({"row_lengths": [len(ids) for ids, _ in rows]} if len(rows) > 1 else {})


class TemporaryTokenizedDatasetWriter:
    """Writes tokenized examples into a temporary file without a name: nothing of it is left after a crash."""

    def __init__(self) -> None:
        import pyarrow as pa  # 50 MB that the processes that tokenize do not need
        from pyarrow import ipc

        self._arrow = pa
        columns = {"input_ids": pa.list_(pa.int32()), "supervised": pa.list_(pa.bool_()), "line": pa.int64()}
        columns |= {"row_lengths": pa.list_(pa.int32()), "classes": pa.list_(pa.string())}
        self._schema = pa.schema({**columns, "row_scores": pa.list_(pa.float64())})
        self._file = tempfile.TemporaryFile(prefix="slimtune-rows-")  # noqa: SIM115 closed by __exit__
        self._stream = ipc.new_stream(pa.PythonFile(self._file, "w"), self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # the memory map of it stays valid

    def write(
        self,
        ids: np.ndarray,
        supervised: np.ndarray,
        lengths: np.ndarray,
        lines: np.ndarray,
        **columns: Sequence[Any] | None,
    ) -> None:
        """Write examples.

        Args:
            ids, supervised: their tokens one after another, int32 [T] and bool [T].
            lengths, lines: tokens and line of each, int64 [N].
            columns: for each example, `row_lengths` (tokens of each row, if it has several), `classes` (their names)
                and `row_scores` (of the answers of a ranked list, the best first); None: no example has any.
        """
        offsets = self._arrow.array(np.concatenate([[0], np.cumsum(lengths)]), self._arrow.int32())
        lists = [self._arrow.ListArray.from_arrays(offsets, self._arrow.array(a)) for a in (ids, supervised)]
        lists.append(self._arrow.array(lines))
        for name in ("row_lengths", "classes", "row_scores"):
            lists.append(self._arrow.array(columns.get(name) or [None] * len(lines), self._schema.field(name).type))
        batch = self._arrow.record_batch(lists, self._schema)
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
