"""Statistics and issues of one batch of rows.

They depend only on the batch and on the settings, which the first batch completes. So batches can be validated in any
process, and `RowFactsCollector` adds them in the order of the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ...core.data.chat_template import TokenizedRow, compile_alternatives_pattern, list_special_and_added_token_ids
from ...core.data.rows import Row, split_preference_into_rows
from ...core.data.tokenize import PairedRow
from ...core.foundation.chat_rendering import render_chat_template
from ...core.foundation.sequences import find_shared_prefix
from .near_duplicates import (
    Array,
    compute_minhash_and_comparable_mask,
    find_common_trigram_hashes,
    hash_whitespace_normalized_texts,
)
from .row_samples import list_text_lines_names_and_tokens
from .swapped_texts import Sides, hash_prompt_and_answer_features
from .text_checks import PLAIN_FORMATS, detect_rendered_chat_format, find_encoding_issues, is_placeholder_answer

SAMPLES = 3
ROW_STATS = np.dtype(
    [("line", np.int64), ("length", np.int64), ("hashes", np.uint64, 3), ("words", np.uint8), ("comparable", np.bool_),
     ("worst", np.uint64), ("answer_tokens", np.int32, 2)]
)  # fmt: skip
"""What is kept of a row that has tokens: its line, its tokens before it is truncated, hashes (see `near_duplicates`; 0:
the row has no such part), words of the answer (255 for as many or more), and whether it has a signature. Of a pair, or
of the best and the worst answer of a list: the hash of the worse answer, and the tokens of both, the better one
first."""


@dataclass
class RowBatchStats:
    """Statistics of the rows of a batch that have tokens, in order."""

    row_stats: Array  # `ROW_STATS` [N]
    minhash_signatures: Array  # uint8 [J, 128], of the comparable rows
    issues: list[tuple[str, int, str]]  # code, line, example
    prefix: list[int] | None  # tokens that all rows begin with; None: there is no row
    samples: list[list[tuple[int, str, TokenizedRow]]]  # line, name and tokens of each text of the first rows
    sides: list[Sides]  # of the rows with one question and one answer
    thinking: list[int]  # turns that think, as `messages.count_thinking_turns_by_use` counts them


class TokenizedRowBatchMeasurer:
    """Validates batches of rows for a tokenizer; it is sent to other processes.

    `common_trigrams` (see `near_duplicates`) are those of the first batch, if they are not set before it.
    """

    def __init__(
        self, tokenizer: Any, max_seq_len: int, documents: bool = False, shown_row_count: int = SAMPLES
    ) -> None:
        self.max_seq_len, self.documents, self.shown_row_count = max_seq_len, documents, shown_row_count
        self.control_tokens = compile_alternatives_pattern(_control_tokens(tokenizer))
        self.special_tokens = compile_alternatives_pattern(t for t in _special_tokens(tokenizer) if t.strip())
        self.template_thinks = "think>" in str(tokenizer.chat_template)
        self.end_ids, self.bos_id = list_special_and_added_token_ids(tokenizer), tokenizer.bos_token_id
        self.common_trigrams: Array | None = None

    def __call__(self, pairs: Sequence[PairedRow]) -> RowBatchStats:
        # Of a preference pair or a ranked list the best row is looked at, and the text of the others.
        valid = [(row, tokens) for row, tokens in pairs if isinstance(tokens, TokenizedRow)]
        found = [(split_preference_into_rows(row)[0], tokens.split()[0]) for row, tokens in valid]
        longest = [max(tokens.row_lengths or (len(tokens.input_ids),)) for _, tokens in valid]
        rejected = [_get_rejected_texts(row) for row, _ in valid]
        worst = [_get_worst_answer(row, tokens) for row, tokens in valid]
        ids = [tokens.input_ids for _, tokens in found]
        if self.common_trigrams is None:
            self.common_trigrams = find_common_trigram_hashes(ids)
        rows = np.zeros(len(found), ROW_STATS)
        issues: list[tuple[str, int, str]] = []
        for i, (row, tokens) in enumerate(found):
            prompt, answer, texts = _split_texts(row, rejected[i])
            words = min(len(answer.split()), 255)
            issues += [(code, row.line, example) for code, example in self._find_issues(row, tokens, answer, texts)]
            if row.is_good is not None:  # what may be contradicted is the label of an answer
                prompt, answer, words = [*prompt, answer], str(row.is_good), 1
                texts = [*texts, ("label", answer)]
            hashes = (
                hash_whitespace_normalized_texts(*(part for text in texts for part in text)),
                hash_whitespace_normalized_texts(*prompt) if prompt else 0,
                _hash_answer(answer),
            )
            rows[i] = row.line, longest[i], hashes, words, False, *worst[i]
        signatures, rows["comparable"] = compute_minhash_and_comparable_mask(
            ids, [t.supervised for _, t in found], self.common_trigrams
        )
        return RowBatchStats(
            rows,
            signatures[rows["comparable"]],
            issues,
            find_shared_prefix(ids) if ids else None,
            [list_text_lines_names_and_tokens(row, tokens) for row, tokens in valid[: self.shown_row_count]],
            [sides for row, _ in found if (sides := hash_prompt_and_answer_features(row)) is not None],
            [sum(counts) for counts in zip(*(tokens.thinking_turn_counts for _, tokens in found), strict=True)]
            or [0, 0, 0],
        )

    def _find_issues(
        self, row: Row, tokens: TokenizedRow, answer: str, texts: list[tuple[str, str]]
    ) -> Iterator[tuple[str, str]]:
        yield from row.findings
        yield from find_encoding_issues([text for _, text in texts])
        if self.documents and (token := self.special_tokens.search(row.completion or "")):
            yield "special-token-as-text" if row.special_tokens_as_text else "special-token-in-document", repr(token[0])
        if row.messages and not self.template_thinks:
            said = (text for role, text in texts if role in ("assistant", "rejected"))
            if text := next((t for t in said if t.count("<think>") != t.count("</think>")), ""):
                yield "unbalanced-thinking", repr(text.strip()[:24])
        if tokens.generation_prompt_differs:
            yield "other-prompt", ""
        if answer and is_placeholder_answer(answer):
            yield "placeholder-answer", repr(answer.strip())
        if self.bos_id is not None and tokens.input_ids[:2] == [self.bos_id, self.bos_id]:
            yield "doubled-bos", ""
        # A longer row is truncated or dropped, and its end with it.
        if len(tokens.input_ids) <= self.max_seq_len and tokens.is_open(self.end_ids):
            yield "missing-end", ""
        for role, text in texts:
            format = detect_rendered_chat_format(text)
            if format and (row.messages or not (format in PLAIN_FORMATS or self.control_tokens.match(text.lstrip()))):
                yield "already-rendered", f"{format}, {role}: {text.strip()[:24]!r}"
                break
            # Raw text may contain a base's own turns and ends of documents.
            if row.messages and (token := self.control_tokens.search(text)):
                yield "control-token-in-text", f"{token[0]!r}, {role}"
                break


def _control_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens that structure a conversation; people may type others, such as `<filename>`."""
    special = _special_tokens(tokenizer)
    control = {t for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if t}
    control |= {t for t in special if t.startswith("<|") and t.endswith("|>")}
    try:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        written = tokenizer.get_chat_template() + render_chat_template(tokenizer, turns)
    except (ValueError, TemplateError):
        return control
    return control | {t for t in special if t.strip() and t in written}


def _special_tokens(tokenizer: Any) -> set[str]:
    return {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)


def _hash_answer(answer: str) -> int:
    return hash_whitespace_normalized_texts(answer.casefold().rstrip(" .!")) if answer else 0


def _get_worst_answer(row: Row, tokens: TokenizedRow) -> tuple[int, tuple[int, int]]:
    """Return `worst` and `answer_tokens` of a pair or a list; zeros for another row."""
    answers, rows = split_preference_into_rows(row), tokens.split()
    if len(answers) == 1:
        return 0, (0, 0)
    counts = sum(rows[0].supervised[1:]), sum(rows[-1].supervised[1:])
    return _hash_answer(_split_texts(answers[-1], [])[1]), counts


def _get_rejected_texts(row: Row) -> list[tuple[str, str]]:
    worse = [row.rejected] if row.answers is None else row.answers[1:]
    messages = [m for a in worse for m in ([{"content": a}] if isinstance(a, str) else a or [])]
    return [("rejected", m.get("content") or "") for m in messages]


def _split_texts(row: Row, rejected: list[tuple[str, str]]) -> tuple[list[str], str, list[tuple[str, str]]]:
    """Return the texts before the last answer, that answer, and all texts of the row with their roles."""
    if row.labels is not None:
        label = ", ".join(sorted(row.labels))
        texts = [(m["role"], m.get("content") or "") for m in row.messages] or [("text", row.prompt or "")]
        if row.is_prompt:
            return [part for text in texts for part in text], "", texts
        return [part for text in texts for part in text], label, [*texts, ("label", label)]
    if row.messages:
        texts = [(m["role"], m.get("content") or "") for m in row.messages]
        calls = [("call", str(m["tool_calls"])) for m in row.messages if m.get("tool_calls")]
        last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        return [part for text in texts[:last] for part in text], texts[last][1], [*texts, *calls, *rejected]
    completion = row.completion or ""
    if row.prompt is None:  # a text is not an answer
        return [], "", [("completion", completion), *rejected]
    return [row.prompt], completion, [("prompt", row.prompt), ("completion", completion), *rejected]
