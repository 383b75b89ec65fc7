"""What a survey keeps of a batch of rows: numbers, keys, and the lines where something is wrong.

A look depends on its batch alone, and on what the first batch taught the `Lens`: so batches can be looked at in any
process, and `Survey` adds the looks up in the file's order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..chat_template import TokenizedRow
from ..formats import Row
from ..records import InvalidRow
from ..tokenize import Pair
from .near_duplicates import Array, common, key, signatures
from .text_checks import PLAIN, is_placeholder, rendered_as, text_marks

SAMPLES = 3


@dataclass
class ValidationSettings:
    """What rows are looked at with; can be sent to another process.

    Args:
        max_seq_len: most tokens of a row.
        on_overlong: what happens to longer ones: "error", "drop" or "truncate".
        control: matches the tokens that structure a conversation of this base, as text.
        ends: ids of the tokens that can end a turn.
        bos: id of the token that begins a sequence; None: there is none.
        known: trigrams that too many rows hold to tell them apart (see `alike`); None: the next look settles them.
    """

    max_seq_len: int
    on_overlong: str
    control: re.Pattern[str]
    ends: frozenset[int]
    bos: int | None
    known: Array | None = None

    def __call__(self, pairs: Sequence[Pair], refused: Sequence[InvalidRow] = ()) -> BatchStats:
        """Look at a batch.

        Args:
            pairs: rows with their tokens, or with why they have none.
            refused: what was refused before it was a row.
        """
        if self.known is None:
            self.known = common([one.input_ids for _, one in pairs if isinstance(one, TokenizedRow)])
        return _look(pairs, refused, self, self.known)


@dataclass
class BatchStats:
    """What stays of a batch: of its rows that have tokens, in their order, and of those refused.

    Args:
        rows: rows read, those refused included.
        lines: int64 [N].
        lengths: int64 [N], tokens before any cut.
        learned: int64 [N], tokens learned of what is kept; -1: the row is left out.
        keys: uint64 [N, 3], see `alike`; 0: the row has no such part.
        words: uint8 [N], words of the answer, 255 for as many and more.
        signatures: uint8 [J, 128], of the rows that can be judged by theirs.
        judged: bool [N], which those are.
        marks: `(code, line, example)`.
        refused: those refused.
        tokens: int32 [T], the kept rows' tokens, one row after another.
        prefix: tokens that all rows begin with; None: there is no row.
        samples: `(line, tokens, learned)` of the first rows.
    """

    rows: int
    lines: Array
    lengths: Array
    learned: Array
    keys: Array
    words: Array
    signatures: Array
    judged: Array
    marks: list[tuple[str, int, str]]
    refused: list[InvalidRow]
    tokens: Array
    prefix: list[int] | None
    samples: list[tuple[int, list[int], list[bool]]]


def fit_settings(tokenizer: Any, *, max_seq_len: int, on_overlong: str) -> ValidationSettings:
    """Return what rows for this tokenizer are looked at with."""
    added = tokenizer.added_tokens_decoder
    special = {t.content for t in added.values() if t.special} | set(tokenizer.all_special_tokens)
    ends = frozenset(tokenizer.all_special_ids) | frozenset(added)
    typed = sorted(map(re.escape, _control(tokenizer, special)), key=len, reverse=True)
    control = re.compile("|".join(typed) or "(?!)")
    return ValidationSettings(max_seq_len, on_overlong, control, ends, tokenizer.bos_token_id)


def _look(pairs: Sequence[Pair], refused: Sequence[InvalidRow], lens: ValidationSettings, known: Array) -> BatchStats:
    refusals = [*refused, *(one for _, one in pairs if isinstance(one, InvalidRow))]
    found = [(row, one) for row, one in pairs if isinstance(one, TokenizedRow)]
    ids = [one.input_ids for _, one in found]
    marks: list[tuple[str, int, str]] = []
    keys = np.zeros((len(found), 3), dtype=np.uint64)
    words = np.zeros(len(found), dtype=np.uint8)
    learned = np.full(len(found), -1, dtype=np.int64)
    for i, (row, one) in enumerate(found):
        prompt, answer, texts = _said(row)
        marks += [(code, row.line, example) for code, example in _marks(row, one, answer, texts, lens)]
        whole = key(*(part for said in texts for part in said))
        keys[i] = whole, key(*prompt) if prompt else 0, key(answer.casefold().rstrip(" .!")) if answer else 0
        words[i] = min(len(answer.split()), 255)
        if len(one.input_ids) <= lens.max_seq_len or lens.on_overlong == "truncate":
            learned[i] = sum(one.supervised[1 : lens.max_seq_len])
            if not learned[i]:
                marks.append(("no-learned-token", row.line, ""))
    kept = [one[: lens.max_seq_len] for one, n in zip(ids, learned, strict=True) if n >= 0]
    signed, judged = signatures(ids, [one.supervised for _, one in found], known)
    return BatchStats(
        rows=len(pairs) + len(refused),
        lines=np.array([row.line for row, _ in found], dtype=np.int64),
        lengths=np.array([len(one) for one in ids], dtype=np.int64),
        learned=learned,
        keys=keys,
        words=words,
        signatures=signed[judged],
        judged=judged,
        marks=marks,
        refused=sorted(refusals, key=lambda r: r.line),
        tokens=np.fromiter((t for one in kept for t in one), dtype=np.int32),
        prefix=shared_beginning(ids) if ids else None,
        samples=[(row.line, one.input_ids, one.supervised) for row, one in found[:SAMPLES]],
    )


def shared_beginning(rows: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # what these share, all share
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:n]


def _control(tokenizer: Any, special: set[str]) -> set[str]:
    """Return the special tokens that structure a conversation: others, like `<filename>`, are typed in good faith."""
    used = {t for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if t}
    used |= {t for t in special if t.startswith("<|") and t.endswith("|>")}
    try:
        template = tokenizer.get_chat_template()
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        shown = template + tokenizer.apply_chat_template(turns, tokenize=False)
    except (ValueError, TemplateError):
        return used
    return used | {t for t in special if t.strip() and t in shown}


def _said(row: Row) -> tuple[list[str], str, list[tuple[str, str]]]:
    """Return what stands before the last answer, that answer, and all of the row's texts with who says them."""
    worse = [("rejected", text) for text in _texts(row.rejected)]
    if not row.messages:
        said = [("prompt", row.prompt)] if row.prompt is not None else []
        said += [("completion", row.completion or "")]
        if row.prompt is None:  # a text answers nothing
            return [], "", [*said, *worse]
        return [row.prompt], row.completion or "", [*said, *worse]
    texts = [(m["role"], m.get("content") or "") for m in row.messages]
    calls = [("call", str(m["tool_calls"])) for m in row.messages if m.get("tool_calls")]
    last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
    before = [part for said in texts[:last] for part in said]
    return before, texts[last][1], [*texts, *calls, *worse]


def _texts(side: list[dict[str, Any]] | str | None) -> list[str]:
    if side is None:
        return []
    return [side] if isinstance(side, str) else [m.get("content") or "" for m in side]


def _marks(
    row: Row, one: TokenizedRow, answer: str, texts: list[tuple[str, str]], lens: ValidationSettings
) -> list[tuple[str, str]]:
    marks = list(text_marks([text for _, text in texts]))
    if answer and is_placeholder(answer):
        marks.append(("hollow-answer", repr(answer.strip())))
    if row.rejected is not None and _texts(row.rejected)[-1].strip() == (answer or texts[0][1]).strip():
        marks.append(("same-pair", ""))
    ids = one.input_ids
    if lens.bos is not None and ids[:2] == [lens.bos, lens.bos]:
        marks.append(("doubled-bos", ""))
    if len(ids) <= lens.max_seq_len:
        last = next((t for t, said in zip(ids[::-1], one.supervised[::-1], strict=True) if said), None)
        if last is not None and last not in lens.ends:
            marks.append(("missing-end", ""))
    for role, text in texts:
        form = rendered_as(text)
        if form and (row.messages or (form not in PLAIN and not lens.control.match(text.lstrip()))):
            marks.append(("already-rendered", f"{form}, {role}: {text.strip()[:24]!r}"))
            break
        # Raw text may hold a base's own turns, and the ends of documents.
        if row.messages and (typed := lens.control.search(text)):
            marks.append(("control-token-in-text", f"{typed[0]!r}, {role}"))
            break
    return marks
