"""Encoded rows outside memory: one temporary file of int32, mapped, which the system keeps or drops as it needs.

    coded [T]   the tokens of all rows, one after another: `id` where nothing is learned, `~id` where it is

The file has no name, so nothing is left of it however the process ends; it lies where `TMPDIR` says.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..utils.files import translate_disk_full

Example = dict[str, Any]
IGNORED = -100


class Examples(Sequence[Example]):
    """Examples `{"input_ids": [L], "labels": [L], "line": int}`, made as they are asked for.

    Args:
        coded: int32 [T].
        begins: int64 [n + 1]: where each row begins, and the end of the last.
        lines: int64 [n]: where each stands in its file.
        chosen: int64 [m]: the rows that these are; None: all.
    """

    def __init__(self, coded: np.ndarray, begins: np.ndarray, lines: np.ndarray, chosen: np.ndarray | None = None):
        self._coded, self._begins, self._lines = coded, begins, lines
        self._chosen = np.arange(len(lines)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example, or a list of them."""
        if isinstance(index, slice):
            return [self._example(row) for row in self._chosen[index]]
        return self._example(self._chosen[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self._chosen)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 `[m]`."""
        return self._begins[self._chosen + 1] - self._begins[self._chosen]

    def digest(self) -> str:
        """Return the SHA-256 of the examples' tokens, of which of them are learned, and of their order."""
        said = hashlib.sha256(self.lengths.tobytes())
        for row in self._chosen:
            said.update(self._coded[self._begins[row] : self._begins[row + 1]].tobytes())
        return said.hexdigest()

    def select(self, rows: np.ndarray) -> Examples:
        """Return these of the examples, by number, in the order given; nothing is copied."""
        return Examples(self._coded, self._begins, self._lines, self._chosen[rows])

    def _example(self, row: int) -> Example:
        coded = self._coded[self._begins[row] : self._begins[row + 1]]
        said = coded < 0
        ids = np.where(said, ~coded, coded)
        return {
            "input_ids": ids.tolist(),
            "labels": np.where(said, ids, IGNORED).tolist(),
            "line": int(self._lines[row]),
        }


class Writer:
    """Takes encoded rows, a block at a time."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="slimtune-rows-")  # noqa: SIM115 closed below
        self._lengths: list[np.ndarray] = []
        self._lines: list[np.ndarray] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # what is mapped of it stays

    def add(self, coded: np.ndarray, lengths: np.ndarray, lines: np.ndarray) -> None:
        """Write rows.

        Raises:
            RunError: the disk is full.
        """
        with translate_disk_full(
            Path(tempfile.gettempdir()) / "slimtune-rows", coded.nbytes, "let TMPDIR name a folder on another disk"
        ):
            self._file.write(coded.astype(np.int32, copy=False).tobytes())
            self._file.flush()
        self._lengths.append(lengths)
        self._lines.append(lines)

    def done(self) -> Examples:
        """Return what was written."""
        begins = np.concatenate([[0], *self._lengths]).cumsum()
        lines = np.concatenate([np.zeros(0, np.int64), *self._lines])
        if begins[-1] == 0:  # nothing can be mapped of an empty file
            return Examples(np.zeros(0, np.int32), begins, lines)
        return Examples(np.memmap(self._file, np.int32, "r"), begins, lines)
