"""Tokenizing rows: batches go through several processes, and come back as flat arrays with a report.

    Row → rendered text with supervised spans → TokenizedRow → kept, truncated or dropped → TokenizedDataset

No row is truncated or dropped without a number in the `TokenizationStats`. The first token of a row is never counted as
supervised, because nothing stands before it to predict it from.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, UsageError, format_names, suggest
from ..foundation.formatting import format_count
from . import chat_template
from .chat_template import RenderedText, TokenizedRow
from .messages import (
    REASONING_KEYS,
    RowError,
    count_thinking_turns_by_use,
    find_thinking_and_source,
    reject_unrendered_reasoning,
)
from .parallel import parallel_map
from .row_observer import TokenizedBatchObserver
from .rows import MAX_ERRORS, InvalidRow, Row, RowErrorCollector, RowIterable, split_preference_into_rows
from .tokenized_dataset import TemporaryTokenizedDatasetWriter, TokenizedDataset

BATCH_SIZE, BATCH_CHARACTERS = 512, 1_000_000
"""Most rows that a process tokenizes at once, and characters from which fewer are enough: each takes 150 bytes."""
ON_OVERLONG = ("error", "drop", "truncate")
TRAIN_ON = ("assistant", "last_assistant")
PARAGRAPH_HINT = (
    "a row of a .txt file is a paragraph: put a blank line between those that should be rows, "
    "or learn from the whole text: --format document"
)
PairedRow = tuple[Row, TokenizedRow | InvalidRow]
"""A row with its tokens, or with the reason why it has none."""


@dataclass
class TokenizationStats:
    """Counts of what happened to the rows of a file."""

    max_seq_len: int
    """Longest row that is kept whole, in tokens."""
    rows: int = 0
    """Rows that were read."""
    kept: int = 0
    """Rows that were kept."""
    dropped: int = 0
    """Rows that were dropped because they are too long."""
    truncated: int = 0
    """Rows that were cut, and kept."""
    tokens: int = 0
    """Tokens of the kept rows."""
    supervised_tokens: int = 0
    """Tokens of the kept rows that are learned."""
    longest: int = 0
    """Tokens of the longest row, before it is cut."""
    missing_eos: int = 0
    """Kept rows without an end-of-turn token; a model that is trained on such rows does not learn to stop."""

    def add(self, other: "TokenizationStats") -> None:
        """Add the counts of another part of the file."""
        for name in ("rows", "kept", "dropped", "truncated", "tokens", "supervised_tokens", "missing_eos"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)

    def text(self) -> str:
        """Return the report as one line."""
        parts = [f"{self.kept} of {self.rows} rows"]
        if self.dropped:
            parts.append(f"{self.dropped} dropped (longer than {self.max_seq_len} tokens)")
        if self.truncated:
            parts.append(f"{self.truncated} truncated to {self.max_seq_len} tokens")
        parts.append(f"{format_count(self.tokens)} tokens")
        if self.supervised_tokens:  # rows of classes have none
            share = 100 * self.supervised_tokens / self.tokens
            parts.append(f"{format_count(self.supervised_tokens)} supervised ({share:.0f} %)")
        parts.append(f"longest row {self.longest}")
        if self.missing_eos:
            parts.append(f"{self.missing_eos} of them without an end-of-turn token at the end")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def batch_rows(rows: Iterable[Row | InvalidRow]) -> Iterator[tuple[Row | InvalidRow, ...]]:
    """Yield the batches in which rows are tokenized."""
    batch: list[Row | InvalidRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        if isinstance(row, Row):
            characters += sum(len(m.get("content", "")) for m in row.messages) + len(row.completion or "")
        if len(batch) == BATCH_SIZE or characters >= BATCH_CHARACTERS:
            yield tuple(batch)
            batch, characters = [], 0
    if batch:
        yield tuple(batch)


def tokenize_rows_with_errors(
    rows: Iterable[Row], tokenizer: Any, *, train_on: str = "assistant"
) -> list[TokenizedRow | InvalidRow]:
    """Return the tokens of each row of a batch with the mask of supervised ones, or why the row has none.

    A text with a label gets the tokens that `tokenizer(text)` gives, special ones included; none of them is supervised.
    A preference pair becomes the tokens of its two rows.
    """
    special_tokens = chat_template.compile_special_token_pattern(tokenizer)

    def render(row: Row) -> RenderedText | TokenizedRow | InvalidRow:
        if row.labels is not None and row.prompt is not None:
            ids = tokenizer(row.prompt, verbose=False)["input_ids"]
            return TokenizedRow(ids, [False] * len(ids))
        if row.special_tokens_as_text and special_tokens.search(row.completion or ""):
            return chat_template.encode_document_with_special_tokens_as_text(tokenizer, row.completion or "")
        if row.completion is not None:
            return chat_template.render_without_template(tokenizer, row.prompt or "", row.completion)
        learned = row.learned
        if train_on == "last_assistant" and row.labels is None:
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            learned = tuple(i == last and (learned is None or learned[i]) for i in range(len(row.messages)))
        has_keys = any(m["role"] == "developer" or not m.keys().isdisjoint(REASONING_KEYS) for m in row.messages)
        try:
            if has_keys:
                reject_unrendered_reasoning(row.messages, chat_template.get_chat_template(tokenizer, row.tools))
            rendered = chat_template.render_chat_with_spans(tokenizer, row.messages, row.tools, learned, special_tokens)
            if row.labels is not None:
                prompt = (tokenizer, row.messages, row.tools)
                return RenderedText(chat_template.render_prompt(*prompt) if row.is_prompt else rendered.text, [])
            thinks = any(find_thinking_and_source(message)[0] for message in row.messages)
            if thinks or row is first:  # one row of each batch tells of a template that asks with another prompt
                generation_prompt_differs = chat_template.prompt_differs_in_generation(
                    tokenizer, row.messages, row.tools, rendered
                )
                rendered = dataclasses.replace(rendered, generation_prompt_differs=generation_prompt_differs)
            if thinks:
                thinking = count_thinking_turns_by_use(row.messages, rendered.text, rendered.assistant_turns, learned)
                rendered = dataclasses.replace(rendered, thinking_turn_counts=thinking)
            return rendered
        except RowError as error:
            return InvalidRow(row.line, str(error), error.code, row.file, error.hint)
        except DataError as error:
            code = "template-leaves-out" if "leaves out" in error.message else "template-refuses"
            return InvalidRow(row.line, error.message, code, row.file, error.hint)

    parts = [split_preference_into_rows(row) for row in rows]
    first = next((row for pair in parts for row in pair if row.messages), None)
    rendered = [render(part) for pair in parts for part in pair]
    texts = [one.text for one in rendered if isinstance(one, RenderedText)]
    tokens = zip(*chat_template.tokenize_rendered_texts(tokenizer, texts), strict=True)
    found: list[TokenizedRow | InvalidRow] = []
    for one in rendered:
        if isinstance(one, RenderedText):
            ids, offsets = next(tokens)
            mask = chat_template.make_supervised_mask(one, offsets)
            found.append(TokenizedRow(ids, mask, one.thinking_turn_counts, one.generation_prompt_differs))
        else:
            found.append(one)
    left = iter(found)
    return [_join_answers([next(left) for _ in pair], row) for pair, row in zip(parts, rows, strict=True)]


def _join_answers(found: Sequence[TokenizedRow | InvalidRow], row: Row) -> TokenizedRow | InvalidRow:
    """Return the rows of a pair or a list as one, or what is wrong with it; a single row as it is."""
    tokens = [one for one in found if isinstance(one, TokenizedRow)]
    if len(tokens) < len(found):
        return next(one for one in found if isinstance(one, InvalidRow))
    is_list, scores = row.scores is not None, row.scores or range(len(tokens))
    for (i, one), (j, other) in itertools.combinations(enumerate(tokens), 2):
        if one.input_ids == other.input_ids and scores[i] != scores[j]:
            same = "two answers with different scores are the same"
            cause = same if is_list else "the chosen answer is the rejected one"
            return InvalidRow(row.line, cause, "same-pair", row.file, "remove the row")
    for number, one in enumerate(tokens if len(tokens) > 1 else ()):
        if not any(one.supervised[1:]):
            name = "an answer" if is_list else f"the {('chosen', 'rejected')[number]} answer"
            cause = f"{name} has no token of its own after the prompt that they share"
            return InvalidRow(row.line, cause, "empty-answer", row.file)
    return chat_template.concatenate_pair_into_one_row(tokens)


@dataclass
class TokenizedBatch:
    """A batch of rows, tokenized, in flat arrays, because Arrow would cost each process that tokenizes 50 MB."""

    counts: TokenizationStats
    invalid: list[InvalidRow]
    ids: np.ndarray  # int32 [T]: the tokens of the kept rows, one row after another
    supervised: np.ndarray  # bool [T]
    lengths: np.ndarray  # int64 [N], of the kept rows
    row_lengths: list[list[int] | None]  # of each row of a kept pair or list
    row_scores: list[list[float] | None]  # of the answers of a kept list
    lines: np.ndarray  # int64 [N]
    overlong: list[int]  # lines of the rows that are too long
    unsupervised: list[int]  # lines of the kept rows without a supervised token, nor a label
    labels: list[tuple[str, ...]] | None  # of the kept rows; None: they have none
    stats: Any  # what `BatchTokenizer.measure` returned


@dataclass(frozen=True)
class BatchTokenizer:
    """Turns a batch of rows into a `TokenizedBatch`; it is sent to other processes.

    `measure` computes the statistics of a batch from its rows with their tokens; the other fields are arguments of
    `tokenize_dataset`. `documents`: the rows are documents, which are whole however long they are.
    """

    tokenizer: Any
    max_seq_len: int
    on_overlong: str
    train_on: str
    measure_batch: Callable[[Sequence[PairedRow]], Any] | None = None
    whole_documents: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("on_overlong", ON_OVERLONG), ("train_on", TRAIN_ON)):
            if (value := getattr(self, name)) not in choices:
                raise UsageError(f"{name} is {value!r}{suggest(value, choices)}", expected=format_names(choices))
        if self.max_seq_len < 2:
            raise UsageError(f"max_seq_len is {self.max_seq_len}", "at least 2 tokens: one to read, one to predict")
        if self.whole_documents and self.on_overlong != "drop":
            message = f"on_overlong is {self.on_overlong!r}, but documents are cut into windows, so none is too long"
            raise UsageError(message, "the default, drop, with the format document")

    def __call__(self, batch: tuple[Row | InvalidRow, ...]) -> TokenizedBatch:
        rows = [row for row in batch if isinstance(row, Row)]
        pairs = list(zip(rows, tokenize_rows_with_errors(rows, self.tokenizer, train_on=self.train_on), strict=True))
        invalid = [row for row in (*batch, *(tokens for _, tokens in pairs)) if isinstance(row, InvalidRow)]
        end_ids = chat_template.list_special_and_added_token_ids(self.tokenizer)
        report = TokenizationStats(self.max_seq_len, rows=len(batch))
        limit = None if self.whole_documents else self.max_seq_len
        kept: list[tuple[Row, TokenizedRow]] = []
        overlong: list[int] = []
        for row, tokens in pairs:
            if isinstance(tokens, InvalidRow):
                continue
            length = max(tokens.row_lengths or (len(tokens.input_ids),))
            report.longest = max(report.longest, length)
            if limit is not None and length > limit:
                overlong.append(row.line)
                if self.on_overlong != "truncate":
                    report.dropped += 1
                    continue
                report.truncated += 1
            report.missing_eos += tokens.is_open(end_ids)
            kept.append((row, tokens if limit is None or length <= limit else tokens.truncate(limit)))
        found = [tokens for _, tokens in kept]
        lengths = np.array([len(tokens.input_ids) for tokens in found], np.int64)
        report.kept, report.tokens = len(kept), int(lengths.sum())
        report.supervised_tokens = sum(sum(tokens.supervised[1:]) for tokens in found)
        return TokenizedBatch(
            report,
            sorted(invalid, key=lambda row: row.line),
            np.fromiter(itertools.chain.from_iterable(t.input_ids for t in found), np.int32, report.tokens),
            np.fromiter(itertools.chain.from_iterable(t.supervised for t in found), bool, report.tokens),
            lengths,
            [list(tokens.row_lengths) if tokens.row_lengths else None for tokens in found],
            [list(row.scores) if row.scores else None for row, _ in kept],
            np.array([row.line for row, _ in kept], np.int64),
            overlong,
            [row.line for row, t in kept if row.labels is None and not all(any(p.supervised[1:]) for p in t.split())],
            [row.label_names for row, _ in kept if row.label_names is not None] or None,
            None if self.measure_batch is None else self.measure_batch(pairs),
        )


def tokenize_dataset(
    rows: RowIterable | Iterable[Row],
    tokenizer: Any,
    *,
    max_seq_len: int,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    source_path: str | Path,
    processes: int = 1,
    observer: TokenizedBatchObserver | None = None,
) -> tuple[TokenizedDataset, TokenizationStats]:
    """Return the tokenized rows in their order, and a report.

    Args:
        rows: a source (`ROW_SOURCES`), or rows.
        tokenizer: a fast tokenizer; it has a chat template if rows are conversations.
        max_seq_len: most tokens of a row (≥ 2).
        on_overlong: what happens to longer rows: "error", "drop" or "truncate".
        train_on: "assistant" (every assistant turn) or "last_assistant" (the last one of each row).
        source_path: the file of the rows, for error messages.
        processes: how many tokenize at once; with more than one, a script needs `if __name__ == "__main__":`.
        observer: measures each batch where it is tokenized, and gets the batches in order, such as a data report.

    Raises:
        DataError: rows are invalid, the template refuses some, rows are too long under "error", none is left, or some
            have no supervised token.
        ModelError: no chat template, or one that hides the assistant's turns.
    """
    measure = None if observer is None else observer.measure_batch
    documents = isinstance(rows, RowIterable) and rows.window_cutter is not None
    function = BatchTokenizer(tokenizer, max_seq_len, on_overlong, train_on, measure, documents)
    if isinstance(rows, RowIterable):
        errors = rows.create_error_collector()
    else:
        errors = RowErrorCollector(
            source_path, hint="change these rows, or use another chat template (data.chat_template)"
        )
    total, overlong, unsupervised = TokenizationStats(max_seq_len), [], []
    with TemporaryTokenizedDatasetWriter() as writer:
        for batch in parallel_map(function, batch_rows(rows), processes):
            columns = {"row_lengths": batch.row_lengths, "classes": batch.labels, "row_scores": batch.row_scores}
            writer.write(batch.ids, batch.supervised, batch.lengths, batch.lines, **columns)
            total.add(batch.counts)
            overlong += batch.overlong
            unsupervised += batch.unsupervised
            if observer is not None:
                observer.on_batch(batch)
            for row in batch.invalid[: MAX_ERRORS - len(errors.messages)]:
                errors.add(row.line, row.cause, row.file, row.hint)
            if errors.full:
                break
        errors.check()
        if isinstance(rows, RowIterable) and observer is None:  # a report has them among its errors
            rows.require_used_columns()
        dataset = writer.finish()
    _check_lengths(source_path, total, on_overlong, overlong, unsupervised)
    return dataset, total


def _check_lengths(
    path: str | Path, total: TokenizationStats, on_overlong: str, overlong: list[int], unsupervised: list[int]
) -> None:
    """Raise DataError if rows are too long under "error", have no supervised token, or are all dropped."""
    limit, longer = total.max_seq_len, f"--max-seq-len {total.longest}, or --set data.on_overlong"
    if Path(path).suffix.lower() == ".txt":
        longer = f"{PARAGRAPH_HINT}, or {longer}"
    if overlong and on_overlong == "error":
        problem = f"longer than {limit} tokens: {format_line_numbers(overlong)}; the longest has {total.longest}"
        expected = f"rows of at most max_seq_len = {limit} tokens"
        raise DataError(f"{path}: {problem}", expected, f"{longer}=drop or truncate")
    if unsupervised:
        cut = total.truncated > 0
        expected = f"an assistant's token {f'within the first {limit}' if cut else 'after the first one'}"
        hint = "a larger --max-seq-len, or --set data.on_overlong=drop" if cut else "remove these rows"
        raise DataError(f"{path}: no supervised token in {format_line_numbers(unsupervised)}", expected, hint)
    if not total.rows:
        raise DataError(f"{path}: there is no row", "at least one row to learn from")
    if not total.kept:
        rows = f"all {total.rows} rows were dropped: each" if total.rows > 1 else "its only row was dropped: it"
        problem = f"{path}: {rows} is longer than {limit} tokens (the longest has {total.longest})"
        raise DataError(problem, "at least one row to learn from", f"{longer}=truncate")


def format_line_numbers(lines: Sequence[int], total_count: int | None = None) -> str:
    """Return line numbers as text: `lines 3, 9, … (40 more)`; `total_count` if there are more than are given."""
    total_count = len(lines) if total_count is None else total_count
    shown = lines[:12]
    more = f", … ({total_count - len(shown):,} more)" if total_count > len(shown) else ""
    return f"line{'s' if total_count > 1 else ''} {', '.join(map(str, shown))}{more}"
