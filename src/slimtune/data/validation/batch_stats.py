"""Statistics and issues of one batch of rows.

They depend only on the batch and on the settings, which the first batch completes. So batches can be validated in any
process, and `DatasetReport` adds them in the order of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ...utils.sequences import common_prefix_length
from ..chat_template import TokenizedRow, compile_alternatives, end_of_turn_ids
from ..formats import InvalidRow, Row
from ..tokenize import PairedRow
from .near_duplicates import Array, compute_signatures, find_common_trigrams, hash_texts
from .text_checks import PLAIN_FORMATS, find_rendered_format, find_text_issues, is_placeholder

SAMPLES = 3


@dataclass
class BatchStats:
    """Statistics of a batch: of its rows that have tokens, in order.

    Args:
        lines: int64 [N].
        lengths: int64 [N], tokens before a row is truncated.
        hashes: uint64 [N, 3], see `near_duplicates`; 0: the row has no such part.
        words: uint8 [N], words of the answer; 255 for as many or more.
        signatures: uint8 [J, 128], of the rows that can be compared.
        comparable: bool [N], which rows these are.
        issues: `(code, line, example)`.
        prefix: tokens that all rows begin with; None: there is no row.
        samples: line, tokens and supervised mask of the first rows.
    """

    lines: Array
    lengths: Array
    hashes: Array
    words: Array
    signatures: Array
    comparable: Array
    issues: list[tuple[str, int, str]]
    prefix: list[int] | None
    samples: list[tuple[int, list[int], list[bool]]]


@dataclass
class BatchValidator:
    """Validates batches of rows; it is sent to other processes.

    Args:
        max_seq_len: most tokens of a row.
        control_tokens: matches the tokens that structure a conversation of this base, as text.
        end_ids: tokens that can end a turn.
        bos_id: the token that begins a sequence; None: there is none.
        common_trigrams: see `near_duplicates`; None: the first batch determines them.
    """

    max_seq_len: int
    control_tokens: re.Pattern[str]
    end_ids: frozenset[int]
    bos_id: int | None
    common_trigrams: Array | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, max_seq_len: int) -> BatchValidator:
        """Return the validator of rows for a tokenizer."""
        control = compile_alternatives(_control_tokens(tokenizer))
        return cls(max_seq_len, control, end_of_turn_ids(tokenizer), tokenizer.bos_token_id)

    def __call__(self, pairs: Sequence[PairedRow]) -> BatchStats:
        """Return the statistics of rows with their tokens; rows without tokens are left out."""
        found = [(row, tokens) for row, tokens in pairs if not isinstance(tokens, InvalidRow)]
        ids, supervised = [t.input_ids for _, t in found], [t.supervised for _, t in found]
        if self.common_trigrams is None:
            self.common_trigrams = find_common_trigrams(ids)
        issues: list[tuple[str, int, str]] = []
        hashes = np.zeros((len(found), 3), dtype=np.uint64)
        words = np.zeros(len(found), dtype=np.uint8)
        for i, (row, tokens) in enumerate(found):
            prompt, answer, texts = _split_texts(row)
            issues += [(code, row.line, example) for code, example in self._find_issues(row, tokens, answer, texts)]
            hashes[i, 0] = hash_texts(*(part for text in texts for part in text))
            hashes[i, 1] = hash_texts(*prompt) if prompt else 0
            hashes[i, 2] = hash_texts(answer.casefold().rstrip(" .!")) if answer else 0
            words[i] = min(len(answer.split()), 255)
        signatures, comparable = compute_signatures(ids, supervised, self.common_trigrams)
        return BatchStats(
            lines=np.array([row.line for row, _ in found], dtype=np.int64),
            lengths=np.array([len(one) for one in ids], dtype=np.int64),
            hashes=hashes,
            words=words,
            signatures=signatures[comparable],
            comparable=comparable,
            issues=issues,
            prefix=find_shared_prefix(ids) if ids else None,
            samples=[(row.line, tokens.input_ids, tokens.supervised) for row, tokens in found[:SAMPLES]],
        )

    def _find_issues(
        self, row: Row, tokens: TokenizedRow, answer: str, texts: list[tuple[str, str]]
    ) -> Iterator[tuple[str, str]]:
        yield from find_text_issues([text for _, text in texts])
        if answer and is_placeholder(answer):
            yield "placeholder-answer", repr(answer.strip())
        if row.rejected is not None and _answer_texts(row.rejected)[-1].strip() == (answer or texts[0][1]).strip():
            yield "same-pair", ""
        if self.bos_id is not None and tokens.input_ids[:2] == [self.bos_id, self.bos_id]:
            yield "doubled-bos", ""
        # A longer row is truncated or dropped, and its end with it.
        if len(tokens.input_ids) <= self.max_seq_len and tokens.is_open(self.end_ids):
            yield "missing-end", ""
        for role, text in texts:
            format = find_rendered_format(text)
            if format and (row.messages or not (format in PLAIN_FORMATS or self.control_tokens.match(text.lstrip()))):
                yield "already-rendered", f"{format}, {role}: {text.strip()[:24]!r}"
                break
            # Raw text may contain a base's own turns and ends of documents.
            if row.messages and (token := self.control_tokens.search(text)):
                yield "control-token-in-text", f"{token[0]!r}, {role}"
                break


def find_shared_prefix(rows: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # in sorted order, what these two share, all share
    return first[: common_prefix_length(first, last)]


def _control_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens that structure a conversation; people may type others, such as `<filename>`."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(tokenizer.all_special_tokens)
    control = {t for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if t}
    control |= {t for t in special if t.startswith("<|") and t.endswith("|>")}
    try:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        written = tokenizer.get_chat_template() + tokenizer.apply_chat_template(turns, tokenize=False)
    except (ValueError, TemplateError):
        return control
    return control | {t for t in special if t.strip() and t in written}


def _split_texts(row: Row) -> tuple[list[str], str, list[tuple[str, str]]]:
    """Return the texts before the last answer, that answer, and all texts of the row with their roles."""
    rejected = [("rejected", text) for text in _answer_texts(row.rejected)]
    if row.messages:
        texts = [(m["role"], m.get("content") or "") for m in row.messages]
        calls = [("call", str(m["tool_calls"])) for m in row.messages if m.get("tool_calls")]
        last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        return [part for text in texts[:last] for part in text], texts[last][1], [*texts, *calls, *rejected]
    completion = row.completion or ""
    if row.prompt is None:  # a text is not an answer
        return [], "", [("completion", completion), *rejected]
    return [row.prompt], completion, [("prompt", row.prompt), ("completion", completion), *rejected]


def _answer_texts(answer: list[dict[str, Any]] | str | None) -> list[str]:
    if answer is None:
        return []
    return [answer] if isinstance(answer, str) else [m.get("content") or "" for m in answer]
