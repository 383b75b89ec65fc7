"""Does an answer still follow from its prompt? The loss after another row's prompt, against the loss after its own.

    use = (Σ nats(answer i | prompt π(i)) - Σ nats(answer i | prompt i)) / Σ tokens          nats per token

π takes each row to another whose prompt differs. What of a loss is style, length or vocabulary is the same after both
prompts and falls out; what is left is what the model reads from the prompt. An adapter that learned style alone, from
answers that do not belong to their prompts, lowers the loss and loses this: the base's own use is the measure, since a
loss of it shows long before nothing is left.

    kept    the interval of the tuned model's use lies above LEAST, and that of its change reaches -TOLERATED · base
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.collator import IGNORED, Example
from ..train_step.loss import RowScore
from .statistics import paired_bootstrap

MOST = 256
"""Rows that are scored after another's prompt, drawn at random where there are more."""
LEAST = 0.01
"""Nats a token: with less a prompt tells nothing of its answer, however sure that little is."""
TOLERATED = 0.1
"""Share of the base's use that may be lost."""


@dataclass(frozen=True)
class Mismatched:
    """Rows after the prompts of others.

    Args:
        rows: numbers of the rows whose answers they hold.
        examples: another row's tokens before its first answer, then this row's from there on.
    """

    rows: list[int]
    examples: list[Example]


def shuffle_prompts(examples: Sequence[Example], seed: int = 0) -> Mismatched:
    """Return rows after the prompt of another row, drawn at random, none longer than the longest of `examples`.

    A row for which no other prompt is found (all rows ask the same) is left out.
    """
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(examples))]
    begins = [_answer(e) for e in examples]
    prompts = [tuple(e["input_ids"][:begin]) for e, begin in zip(examples, begins, strict=True)]
    longest = max(len(e["input_ids"]) for e in examples)
    rows, found = [], []
    for place, i in enumerate(order[:MOST]):
        answer = {key: examples[i][key][begins[i] :] for key in ("input_ids", "labels")}
        others = (prompts[j] for j in order[place + 1 :] + order[:place])
        room = longest - len(answer["input_ids"])
        other = next((p for p in others if p and p != prompts[i] and len(p) <= room), None)
        if other is not None:
            ids, labels = list(other) + answer["input_ids"], [IGNORED] * len(other) + answer["labels"]
            rows.append(i)
            found.append({"input_ids": ids, "labels": labels, "line": examples[i]["line"]})
    return Mismatched(rows, found)


def _answer(example: Example) -> int:
    """Return where the first answer begins."""
    return next(t for t, label in enumerate(example["labels"]) if label != IGNORED and t > 0)


def prompt_dependence(
    swapped: Mismatched,
    base: Sequence[RowScore],
    tuned: Sequence[RowScore],
    judge: Callable[[Sequence[Example]], tuple[list[RowScore], list[RowScore]]],
    **bootstrap: int,
) -> dict[str, Any] | None:
    """Return `rows`, `base`, `tuned` and `change` (nats per token; each with `_ci95`), `kept`; None: all ask the same.

    Args:
        swapped: rows after the prompts of others.
        base: every row after its own prompt, under the base.
        tuned: the same under the tuned model.
        judge: what base and tuned make of rows.
        bootstrap: `draws` and `seed`.
    """
    if not swapped.rows:
        return None
    others = judge(swapped.examples)
    uses = [
        [other.nats - own[i].nats for i, other in zip(swapped.rows, side, strict=True)]
        for side, own in zip(others, (base, tuned), strict=True)
    ]
    found = paired_bootstrap(uses[1], uses[0], [base[i].tokens for i in swapped.rows], **bootstrap)
    every = {"base": found.tuned, "tuned": found.base, "change": found.difference}
    figures = {name: e.value for name, e in every.items()} | {f"{name}_ci95": e.interval for name, e in every.items()}
    kept = found.base.low > LEAST and found.difference.high >= -TOLERATED * max(0.0, found.tuned.value)
    return {"rows": len(swapped.rows), **figures, "kept": kept}
