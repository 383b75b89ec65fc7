"""The survey of a file by itself: read, tokenized and looked at in batches, over all cores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..read import RowFile, open_rows
from ..tokenize import batched
from ..workers import cpu_count, in_order
from .report import DatasetReport
from .validate_batch import BatchValidator


def validate_file(
    path: str | Path,
    tokenizer: Any,
    *,
    model: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_seq_len: int = 1024,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    rows_a_step: int = 8,
    validation: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Return the report on a file of rows, as JSON takes it.

    Args:
        path: a file, a folder or a dataset's id, as `open_rows` takes it.
        tokenizer: of the base that will read the rows.
        model: the base's name.
        format, columns: see `open_rows`.
        max_seq_len: most tokens of a row, from 2.
        on_overlong: what happens to longer ones: "error", "drop" or "truncate".
        train_on: "assistant" (every assistant turn) or "last_assistant" (the last one of each row).
        rows_a_step: rows that a step lays together, from 1.
        validation: rows that must not be among these.
        processes: how many look at once; None: as many as there are cores.

    Raises:
        UsageError: there is no such file, or a setting is out of its range.
        DataError: the file is of no known format, or holds nothing.
        ModelError: no chat template, or one that hides the assistant's turns.
    """
    if max_seq_len < 2 or rows_a_step < 1:
        got = f"max_seq_len is {max_seq_len}" if max_seq_len < 2 else f"a step of {rows_a_step} rows"
        raise UsageError(got, "2 tokens or more, and a row or more in a step")

    def seen(rows: RowFile, like: DatasetReport | None = None) -> DatasetReport:
        survey = DatasetReport(
            tokenizer, max_seq_len=max_seq_len, on_overlong=on_overlong, rows_a_step=rows_a_step, like=like
        )
        survey.format = rows.format
        work = BatchValidator(tokenizer, survey.look, train_on)
        for one in in_order(work, batched(rows), cpu_count() if processes is None else processes):
            survey.add(one)
        return survey

    rows = open_rows(path, format=format, columns=columns)
    held = None if validation is None else open_rows(validation, format=format, columns=columns)
    survey = seen(rows)
    other = None if held is None else (str(validation), seen(held, survey))
    return survey.report(file=path, model=model, validation=other)
