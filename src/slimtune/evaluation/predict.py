"""Predictions for new texts: the class of each by a trained classifier, or its reward by a reward model."""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.config import TrainSettings
from ..core.data.rows import InvalidRow, Record, Row, RowErrorCollector
from ..core.data.tokenize import tokenize_rows_with_errors
from ..core.foundation.files import to_json, write_atomic
from ..core.foundation.json_results import INLINE, OMIT_NONE, to_json_dict
from ..core.foundation.sequences import IGNORE_INDEX
from ..core.models.base_config import get_max_positions
from ..core.training.loss import build_run_collator, compute_row_logits, score_examples_by_number
from ..core.training.run_dir import RunDir
from ..core.training.trained_model import TrainedModel, load_run
from ..errors import AdapterError, UsageError
from ..extras.column_guesses import make_column_flags_and_doubt
from ..extras.row_columns import ColumnMapping, parse_row_or_error
from ..extras.row_files import list_dataset_file_names_with_readers
from .output_files import resolve_output_file

INPUT_ROLES = ("text", "messages")
HINT_ROWS = 20
"""Records from whose columns a hint guesses which one is the text."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a classifier or a reward model predicts for one row."""

    predicted: str | Sequence[str] | None = field(default=None, metadata=OMIT_NONE)
    """The likeliest class; if a row may have any number of classes, the list of those with a probability above 0.5.
    Left out by a reward model."""
    probabilities: dict[str, float] | None = field(default=None, metadata=OMIT_NONE)
    """Probability of each class. Left out by a reward model."""
    reward: float | None = field(default=None, metadata=OMIT_NONE)
    """Reward of the row. Left out by a classifier."""


@dataclass(frozen=True, kw_only=True)
class TextPrediction:
    """What `slimtune predict RUN TEXT --json` prints."""

    run: str
    """The run folder or adapter folder."""
    text: str
    """The text."""
    prediction: Prediction = field(metadata=INLINE)


@dataclass(frozen=True)
class PredictedText:
    """A text with its prediction."""

    text: str
    """The text."""
    prediction: Prediction = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class TextPredictions:
    """What `slimtune predict RUN TEXT TEXT … --json` prints."""

    run: str
    """The run folder or adapter folder."""
    texts: list[PredictedText]
    """The texts with their predictions, in order."""


@dataclass(frozen=True, kw_only=True)
class FilePredictions:
    """What `slimtune predict RUN --data FILE --json` prints."""

    run: str
    """The run folder or adapter folder."""
    data: str
    """File of the rows."""
    out: str
    """File with the rows and their predictions."""
    rows: int
    """Number of rows."""
    classes: dict[str, int] | None
    """Rows by predicted class, the most frequent first; null: a reward model."""
    mean_reward: float | None
    """Mean reward of the rows; null: a classifier."""
    seconds: float
    """Time of the command."""


def predict_file(
    run: Path, data_file: Path, out: Path, *, columns: Mapping[str, str] | None = None, device: str | None = None
) -> FilePredictions:
    """Write the rows of a file as JSONL, each with the prediction that `predict_classes_or_rewards` adds to it.

    Arguments and errors are those of `predict_records`; nothing is written if one is raised.
    """
    start = time.perf_counter()
    run, data_file, out = Path(run), Path(data_file), resolve_output_file(Path(out))
    if out.exists() and data_file.exists() and out.samefile(data_file):
        raise UsageError(f"{out} has the rows, which the answers would replace", "another file")
    records = predict_records(run, data_file, columns=columns, device=device)
    write_atomic(out, "".join(to_json(record) + "\n" for record in records))
    names = [str(name) for r in records if "predicted" in r for name in np.atleast_1d(np.array(r["predicted"]))]
    rewards = [r["reward"] for r in records if "predicted" not in r]
    return FilePredictions(
        run=str(run),
        data=str(data_file),
        out=str(out),
        rows=len(records),
        classes=None if rewards else dict(Counter(names).most_common()),
        mean_reward=float(np.mean(rewards)) if rewards else None,
        seconds=round(time.perf_counter() - start, 3),
    )


def predict_records(
    run: Path, data_file: Path, *, columns: Mapping[str, str] | None = None, device: str | None = None
) -> list[Record]:
    """Return the records of a file, each with the prediction that `predict_classes_or_rewards` adds to it.

    `columns` names the columns of the text or the messages by these roles; None or {}: as the run's recipe does, for
    rows that have such a column.

    Raises:
        UsageError: no such run or file, or the run is no classifier.
        DataError: a row is neither a text nor messages.
    """
    run, data_file = Path(run), Path(data_file)
    own = RunDir(run)
    known = own.load_recipe().data.columns if not columns and own.recipe_file.is_file() else columns or {}
    rows = _read_inputs(data_file, known, is_given=bool(columns))
    found = predict_classes_or_rewards(load_run(run, device=device), [row for row, _ in rows])
    return [{**record, **to_json_dict(new)} for (_, record), new in zip(rows, found, strict=True)]


def _read_inputs(path: Path, columns: Mapping[str, str], *, is_given: bool) -> list[tuple[Row, Record]]:
    """Return the rows of a file with their records; raise DataError with the lines that are no text and no messages."""
    rows: list[tuple[Row, Record]] = []
    names = {role: column for role, column in columns.items() if role in INPUT_ROLES}
    errors = RowErrorCollector(path, f"rows with {' or '.join(repr(names.get(role, role)) for role in INPUT_ROLES)}")
    first: list[Record] = []
    for file, read in list_dataset_file_names_with_readers(path):
        for found in read():
            row: Row | InvalidRow
            if isinstance(found, InvalidRow):
                row = found
            else:
                first += [found[1]] if len(first) < HINT_ROWS else []
                # A recipe's column counts where a row has it: new rows may have the format's own names.
                used = {role: c for role, c in names.items() if is_given or c in found[1]}
                mapping = ColumnMapping(used)
                row = parse_row_to_classify_or_error(mapping.apply(found[1]), found[0], file)
                if isinstance(row, InvalidRow):
                    row = dataclasses.replace(row, cause=mapping.use_file_names(row.cause))
            if isinstance(row, InvalidRow):
                is_other_column = row.code == "bad-text" and first
                hint = (
                    make_column_flags_and_doubt("classification", ("text",), first)[0] if is_other_column else row.hint
                )
                errors.add(row.line, row.cause, row.file, hint)
            elif isinstance(row, Row) and not isinstance(found, InvalidRow):
                rows.append((row, found[1]))
            if errors.full:
                errors.check()
    if not rows and not errors.messages:
        errors.add(1, "contains no rows")
    errors.check()
    return rows


def parse_row_to_classify_or_error(record: Record, line: int = 1, file: str | None = None) -> Row | InvalidRow:
    """Return a record with a text or messages as a row to classify; a label that it has is not read."""
    return parse_row_or_error({**record, "label": "?"}, "classification", line, file)


def predict_classes_or_rewards(trained: TrainedModel, rows: Sequence[Row]) -> list[Prediction]:
    """Return the prediction for each row.

    Raises:
        UsageError: the run is no classifier, or a row is longer than the model's context.
        DataError: the chat template refuses a row.
    """
    classes, model, tokenizer = trained.classes, trained.model, trained.base.tokenizer
    if classes is None:
        folder = trained.adapter_folder
        hint = f"slimtune generate {folder.parent if trained.recipe else folder} lets it answer"
        raise UsageError(
            f"{trained.adapter_folder} is the adapter of a language model", "a classifier or reward model", hint
        )
    context = get_max_positions(model.config)
    examples: list[dict[str, Any]] = []
    errors = RowErrorCollector("the rows", hint="shorten or remove these rows")
    for row, tokens in zip(rows, tokenize_rows_with_errors(rows, tokenizer), strict=True):
        if isinstance(tokens, InvalidRow):
            errors.add(row.line, tokens.cause, row.file)
            continue
        ids = tokens.input_ids
        if context is not None and len(ids) > context:
            errors.add(row.line, f"has {len(ids)} tokens, and the model's context holds {context}", row.file)
        examples.append({"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), "line": row.line})
    errors.check()
    train = trained.recipe.train if trained.recipe is not None else TrainSettings(packing=False)
    collator = build_run_collator(train, model, tokenizer, max(len(e["input_ids"]) for e in examples))
    scores = score_examples_by_number(
        model, examples, collator, lambda batch: compute_row_logits(model, batch).double()
    )
    logits = np.array([scores[i] for i in range(len(examples))])
    if not np.isfinite(logits).all():
        raise AdapterError("the classifier computes NaN or Inf", "finite logits", "evaluate in float32")
    if not classes.names:
        return [Prediction(reward=float(reward)) for (reward,) in logits]
    if classes.multi_label:
        probabilities = torch.from_numpy(logits).sigmoid().numpy()
        predicted: list[Any] = [
            [n for n, p in zip(classes.names, row, strict=True) if p > 0.5] for row in probabilities
        ]
    else:
        probabilities = torch.from_numpy(logits).softmax(1).numpy()
        predicted = [classes.names[i] for i in logits.argmax(1)]
    return [
        Prediction(predicted=name, probabilities=dict(zip(classes.names, row.tolist(), strict=True)))
        for name, row in zip(predicted, probabilities, strict=True)
    ]
