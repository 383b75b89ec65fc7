"""Sample rows of a report: the text of each answer as the model reads it, and which of it is learned."""

from collections.abc import Iterable, Iterator
from typing import Any

from ...core.data.chat_template import TokenizedRow
from ...core.data.rows import Row, split_preference_into_rows
from ...core.foundation.formatting import format_count
from ...errors import format_names
from .data_report import SamplePiece, SampleRow

SAMPLE_CHARACTERS = 1500
SAMPLE_TOKENS = 8192  # of a longer text no more is decoded
PROMPT_CHARACTERS = 400
"""Characters of a part that is not learned, in a row with more than `SAMPLE_CHARACTERS`: what is learned must show."""


def list_answer_names(row: Row) -> list[str]:
    """Return what each text of a row is called: chosen and rejected, the place of an answer, or its label."""
    if row.chosen is not None:
        return ["chosen answer", "rejected answer"]
    if row.answers is not None:
        count = len(row.answers)
        middle = [f"answer {i} of {count}" for i in range(2, count)]
        return [f"best of {count} answers", *middle, f"worst of {count} answers"]
    if row.is_good is not None:
        return ["good answer" if row.is_good else "bad answer"]
    if row.labels is not None:
        return [f"label {format_names(row.labels) or 'none'}"]
    return [""]


def list_text_lines_names_and_tokens(row: Row, tokenized_row: TokenizedRow) -> list[tuple[int, str, TokenizedRow]]:
    """Return line, name and tokens of each text of a row."""
    parts = [
        TokenizedRow(part.input_ids[:SAMPLE_TOKENS], part.supervised[:SAMPLE_TOKENS]) for part in tokenized_row.split()
    ]
    return [(row.line, name, part) for name, part in zip(list_answer_names(row), parts, strict=True)]


def make_token_sample(tokenizer: Any, line: int, name: str, tokenized_row: TokenizedRow) -> SampleRow:
    """Return a text of a row by its tokens."""
    ids, supervised, begin = tokenized_row.input_ids, tokenized_row.supervised, 0
    pieces: list[tuple[str, bool]] = []
    for end in range(1, len(ids) + 1):
        if end == len(ids) or supervised[end] != supervised[begin]:
            pieces.append((decode_with_special_tokens(tokenizer, ids[begin:end]), bool(supervised[begin])))
            begin = end
    return _make_sample(line, name, pieces)


def decode_with_special_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens, special ones included."""
    if not ids:
        return ""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def make_row_samples(row: Row) -> list[SampleRow]:
    """Return the texts of a row as they are read from the file, for which no base is needed."""
    parts = split_preference_into_rows(row)
    return [
        _make_sample(row.line, name, _split_into_pieces(part))
        for name, part in zip(list_answer_names(row), parts, strict=True)
    ]


def _split_into_pieces(row: Row) -> Iterator[tuple[str, bool]]:
    if not row.messages:
        yield row.prompt or "", False
        yield row.completion or "", True
    for i, message in enumerate(row.messages):
        is_learned = message["role"] == "assistant" if row.learned is None else row.learned[i]
        calls = [str(call["function"]) for call in message.get("tool_calls", ())]
        yield "\n" * (i > 0) + f"{message['role']}: ", False
        yield "\n".join(filter(None, [message.get("content", ""), *calls])), is_learned and row.labels is None


def _make_sample(line: int, name: str, pieces: Iterable[tuple[str, bool]]) -> SampleRow:
    """Return a sample of at most `SAMPLE_CHARACTERS`; of what is not learned, the middle is left out first."""
    found = [(text, supervised) for text, supervised in pieces if text]
    if sum(len(text) for text, _ in found) > SAMPLE_CHARACTERS:
        found = [(text if supervised else _leave_out_middle(text), supervised) for text, supervised in found]
    shown, left = [], SAMPLE_CHARACTERS
    for text, supervised in found:
        if left > 0:
            shown.append(SamplePiece(text[:left] + "…" * (len(text) > left), supervised))
        left -= len(text)
    return SampleRow(line, shown, name)


def _leave_out_middle(text: str) -> str:
    half = PROMPT_CHARACTERS // 2
    if len(text) <= PROMPT_CHARACTERS:
        return text
    return f"{text[:half]} … {format_count(len(text) - PROMPT_CHARACTERS)} characters … {text[-half:]}"
