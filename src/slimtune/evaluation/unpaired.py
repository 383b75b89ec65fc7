"""Answers with a label, good or bad: how well base and tuned model separate them.

    auc           probability that a good answer has a higher log p than a bad one, summed over its tokens
    token_auc     the same per token of an answer, which does not favour short answers
    reward_auc    the same for the rewards of KTO: log p of the tuned model - log p of the base; chance is 0.5
    margin        mean reward of good answers - mean reward of bad ones, in nats

Intervals are by bootstrap over rows.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import DataError
from .base import Evaluation, RowFigures
from .statistics import bootstrap_auc, make_fields
from .supervised import measure_supervised_rows


class UnpairedEvaluation(Evaluation):
    """Compares how base and tuned model separate good answers from bad ones, and the losses of the good ones."""

    def measure(self) -> tuple[dict[str, Any], RowFigures]:
        is_good = np.array([e["label"] for e in self.examples], bool)
        if is_good.all() or not is_good.any():
            label = str(bool(is_good.all())).lower()
            hint = "--data FILE, or set more rows aside before training: --test-fraction 0.2"
            raise DataError(f"every evaluated row has the label {label}", "good and bad answers", hint)
        good, bad = (self.examples.select(np.flatnonzero(part)) for part in (is_good, ~is_good))
        result, figures, scores_of_good = measure_supervised_rows(replace(self, examples=good), good)
        base, tuned, tokens = np.zeros((3, len(is_good)))
        for part, (before, after) in ((is_good, scores_of_good), (~is_good, self.score_both(bad))):
            base[part], tuned[part] = ([-s.nats for s in scores] for scores in (before, after))
            tokens[part] = [s.tokens for s in before]
        options = {"draws": self.draws, "seed": self.seed}
        measures = measure_unpaired_preferences(base, tuned, tokens, is_good, self.groups, **options)
        result["different_rows"] = len(np.unique(self.groups))
        return {**result, "unpaired_preference": measures, "prompt_dependence": None}, figures

    @staticmethod
    def list_reasons_not_passed(result: Mapping[str, Any]) -> list[str]:
        measures = result["unpaired_preference"]
        low, high = measures["reward_auc_ci95"]
        if low > 0.5:
            return []
        if measures["good_reward"] == measures["bad_reward"] == 0:
            return ["the adapter changes nothing: every answer has the reward 0"]
        what = "makes bad answers likelier" if high < 0.5 else "is not shown to tell good answers from bad ones"
        interval = f"with a probability of {low:.3f} to {high:.3f}, where chance is 0.5"
        return [f"the tuned model {what}: a good answer has a higher reward than a bad one {interval}"]


def measure_unpaired_preferences(
    base: np.ndarray,
    tuned: np.ndarray,
    tokens: np.ndarray,
    is_good: np.ndarray,
    groups: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Return the measures of the module with intervals: `base_…`, `tuned_…` and `…_gain` of the first two.

    `base` and `tuned` are log p of each answer [N], `tokens` their numbers of tokens [N], `is_good` their labels, bool
    [N] and not all the same, and `groups` the groups of equal rows [N], which are drawn together.
    """
    rewards = tuned - base
    means = [float(rewards[part].mean()) for part in (is_good, ~is_good)]
    result: dict[str, Any] = {"good": int(is_good.sum()), "bad": int((~is_good).sum())}
    for names, scores in (
        (("tuned_auc", "base_auc", "auc_gain"), [tuned, base]),
        (("tuned_token_auc", "base_token_auc", "token_auc_gain"), [tuned / tokens, base / tokens]),
        (("reward_auc",), [rewards]),
    ):
        found = bootstrap_auc(np.stack(scores), is_good, groups, draws=draws, seed=seed)
        result |= make_fields(**dict(zip(names, found, strict=True)))
    return result | {"good_reward": means[0], "bad_reward": means[1], "margin": means[0] - means[1]}
