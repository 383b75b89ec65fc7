"""Does an answer still depend on its prompt? The loss after another row's prompt against the loss after its own.

    dependence = (Σ nats(answer i | prompt π(i)) - Σ nats(answer i | prompt i)) / Σ tokens        nats per token

π maps each row to another row with a different prompt. The part of the loss that comes from style, length or vocabulary
is the same after both prompts and cancels; what remains is what the model reads from the prompt. An adapter that only
learned style, from answers that do not belong to their prompts, lowers the loss but loses this. The base's own
dependence is the reference, because a decrease shows long before nothing remains.

    passed = the interval of the tuned model's dependence is above MIN_DEPENDENCE,
             and the interval of its change reaches up to -TOLERATED_LOSS · base
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..core.data.collator import IGNORE_INDEX, Example
from .eval_result import PromptDependence
from .row_scores import RowScore
from .statistics import paired_bootstrap

MAX_ROWS = 256
"""Rows that are scored after another row's prompt, drawn at random if there are more."""
MIN_DEPENDENCE = 0.01
"""Nats per token: below this the prompt says practically nothing about the answer."""
TOLERATED_LOSS = 0.1
"""Share of the base's dependence that may be lost."""


def make_shuffled_prompt_examples(examples: Sequence[Example], seed: int = 0) -> dict[int, Example]:
    """Return rows, by their index in `examples`, with the prompt of a randomly drawn other row before their answer.

    A prompt is what comes before a row's first supervised token. No new row is longer than the longest of `examples`;
    a row is left out if it has no prompt, or if no different prompt fits, for example because all rows ask the same.
    """
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(examples))]
    starts = [next(t for t, label in enumerate(e["labels"]) if label != IGNORE_INDEX) for e in examples]
    prompts = [tuple(example["input_ids"][:start]) for example, start in zip(examples, starts, strict=True)]
    longest = max(len(example["input_ids"]) for example in examples)
    shuffled: dict[int, Example] = {}
    for position, i in enumerate(order[:MAX_ROWS]):
        ids, labels = (examples[i][key][starts[i] :] for key in ("input_ids", "labels"))
        candidates = (prompts[j] for j in order[position + 1 :] + order[:position])
        prompt = next((p for p in candidates if p and p != prompts[i] and len(p) + len(ids) <= longest), None)
        if prompt is not None and prompts[i]:
            labels = [IGNORE_INDEX] * len(prompt) + labels
            shuffled[i] = {"input_ids": [*prompt, *ids], "labels": labels, "line": examples[i]["line"]}
    return shuffled


def measure_prompt_dependence(
    shuffled: dict[int, Example],
    base: Sequence[RowScore],
    tuned: Sequence[RowScore],
    score_both: Callable[[Sequence[Example]], tuple[list[RowScore], list[RowScore]]],
    **bootstrap: int,
) -> PromptDependence | None:
    """Return how much base and tuned model depend on the prompts, or None if all rows ask the same.

    `shuffled` comes from `make_shuffled_prompt_examples`; `base` and `tuned` are the scores of every row after its
    own prompt; `score_both` scores rows by both models; `bootstrap` is `draws` and `seed`.
    """
    if not shuffled:
        return None
    base_increase, tuned_increase = (
        [after.nats - own[i].nats for i, after in zip(shuffled, shuffled_scores, strict=True)]
        for shuffled_scores, own in zip(score_both(list(shuffled.values())), (base, tuned), strict=True)
    )
    tokens = [base[i].tokens for i in shuffled]
    # The bootstrap subtracts its second argument from its first: tuned - base.
    found = paired_bootstrap(tuned_increase, base_increase, tokens, **bootstrap)
    base_dependence, dependence, change = found.second, found.first, found.difference
    return PromptDependence(
        rows=len(shuffled),
        base=base_dependence,
        tuned=dependence,
        change=change,
        passed=dependence.low > MIN_DEPENDENCE and change.high >= -TOLERATED_LOSS * max(0.0, base_dependence.value),
    )
