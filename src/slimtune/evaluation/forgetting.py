"""What the base knew and the tuned model no longer does: the loss on general text that the adapter never saw.

    change = Σ (u_i - b_i) / Σ t_i          nats per token over pieces i; above 0: something is lost

The text is the one that ships (general/: prose, questions and answers, code, twelve languages; 59 KB) or a file of the
user's. A budget is kept unless the whole interval of the change lies above it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.chat_template import encode_chat
from ..data.collator import IGNORED, Example
from ..data.read import RowErrors
from ..errors import DataError, UsageError, nearest
from ..train_step.loss import RowScore
from .statistics import paired_bootstrap

SHIPPED = Path(__file__).parent / "general" / "text.jsonl"
BUDGET = 0.1
WINDOW = 256
"""Most tokens of a piece: rows of one text count as one in the interval, and an interval wants many."""

Piece = str | list[dict[str, str]]


def read_pieces(file: Path) -> list[tuple[int, str, Piece]]:
    """Return `(line, kind, text or messages)` of a file: a .txt as one text, of any other name as JSONL.

    Raises:
        UsageError: there is no such file.
        DataError: it holds no text, or lines that are neither `{"text"}` nor `{"messages"}`.
    """
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UsageError(f"there is no file {str(file)!r}{nearest(file.name, beside)}", "a .txt or .jsonl file of text")
    faults = RowErrors(file, expected='UTF-8 text; a JSONL file: {"text": "…"} or {"messages": […]} on each line')
    found: list[tuple[int, str, Piece]] = []
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".txt":
            found = [(1, "text", text)] if text.strip() else []
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip() and not faults.full:
                    _add(found, faults, number, line)
    except UnicodeDecodeError as e:
        faults.add(1, f"is not UTF-8 at byte {e.start}")
    if not found and not faults.found:
        faults.add(1, "holds no text")
    faults.check()
    return found


def examples_of(
    pieces: Sequence[tuple[int, str, Piece]], file: Path, tokenizer: Any, most: int = 2 * WINDOW
) -> list[Example]:
    """Return pieces as rows to score, each with its `kind`: of a text every token, of messages what the assistant says.

    A text becomes several rows, of 256 tokens at most; messages one, cut at `most` tokens.

    Raises:
        DataError: the chat template refuses messages, or there is nothing to predict.
    """
    found: list[Example] = []
    faults = RowErrors(file, hint="change these lines")
    for line, kind, piece in pieces:
        if isinstance(piece, str):
            ids = tokenizer(piece, verbose=False)["input_ids"]
            length = min(WINDOW, most)
            rows = [(ids[at : at + length],) * 2 for at in range(0, len(ids), length)]
        else:
            try:
                one = encode_chat(tokenizer, piece)
            except DataError as e:
                faults.add(line, e.message)
                continue
            labels = [t if said else IGNORED for t, said in zip(one.input_ids, one.supervised, strict=True)]
            rows = [(one.input_ids[:most], labels[:most])]
        found += [
            {"input_ids": ids, "labels": labels, "line": line, "kind": kind}
            for ids, labels in rows
            if any(label != IGNORED for label in labels[1:])
        ]
    if not found and not faults.found:
        faults.add(1, "holds nothing to predict: too little text, or nothing that an assistant says")
    faults.check()
    return found


def measure_forgetting(
    examples: Sequence[Example],
    judge: Callable[[Sequence[Example]], tuple[list[RowScore], list[RowScore]]],
    budget: float,
    **bootstrap: int,
) -> dict[str, Any]:
    """Return `tokens`, `base_loss`, `tuned_loss`, `change`, `change_ci95`, `budget`, `within` and `kinds`.

    Args:
        examples: pieces of general text.
        judge: what base and tuned make of rows.
        budget: nats per token that may be lost.
        bootstrap: `draws` and `seed`.
    """
    base, tuned = judge(examples)

    def compare(rows: Sequence[int]) -> dict[str, Any]:
        before, after = ([side[i].nats for i in rows] for side in (base, tuned))
        tokens = [base[i].tokens for i in rows]
        found = paired_bootstrap(before, after, tokens, **bootstrap)
        return {
            "tokens": sum(tokens),
            "base_loss": found.base.value,
            "tuned_loss": found.tuned.value,
            "change": 0.0 - found.difference.value,
            "change_ci95": [0.0 - found.difference.high, 0.0 - found.difference.low],
        }

    kinds = list(dict.fromkeys(e["kind"] for e in examples))
    result = compare(range(len(examples)))
    within = result["change_ci95"][0] <= budget
    parts = {kind: compare([i for i, e in enumerate(examples) if e["kind"] == kind]) for kind in kinds}
    return {**result, "budget": budget, "within": within, "kinds": parts}


def _add(found: list[tuple[int, str, Piece]], faults: RowErrors, number: int, line: str) -> None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        faults.add(number, f"does not parse as JSON ({e.msg} at column {e.colno})")
        return
    kind = str(row.get("kind", "text")) if isinstance(row, dict) else ""
    match row:
        case {"text": str(text)} if text.strip():
            found.append((number, kind, text))
        case {"messages": [*messages]} if messages and all(_said(m) for m in messages):
            found.append((number, kind, [{"role": m["role"], "content": m["content"]} for m in messages]))
        case _:
            faults.add(number, f"is neither a text nor messages: {line.strip()[:80]}")


def _said(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
