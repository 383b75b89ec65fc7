"""Evaluation of preferences: how well base and tuned model separate better answers from worse ones.

Pairs, whose intervals are paired over examples:

    accuracy          share of pairs with log p(chosen) > log p(rejected), summed over the tokens of an answer
    token_accuracy    the same per token of an answer, which does not favour the shorter one
    margin            mean of log p(chosen) − log p(rejected), in nats per pair

A pair on which the tuned model's margin is higher than the base's is one whose chosen answer has the higher reward in
TRL's sense (`rewards/accuracies`), with the base as the reference.

Answers with a label, good or bad, whose intervals are by bootstrap over rows:

    auc           probability that a good answer has a higher log p than a bad one, summed over its tokens
    token_auc     the same per token of an answer, which does not favour short answers
    reward_auc    the same for the rewards of KTO: log p of the tuned model - log p of the base; chance is 0.5
    margin        mean reward of good answers - mean reward of bad ones, in nats
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core.data.tokenized_dataset import AnswerSubset, Example, split_rows
from ..core.foundation.progress_bars import name_progress
from ..core.training.loss import count_targets, score_row_logps
from ..core.training.objective import list_better_and_worse
from ..errors import DataError
from .model_comparison import Evaluation, RowFigures
from .sft_comparison import measure_supervised_rows
from .statistics import PairedEstimate, bootstrap_auc, format_interval, make_fields

Logps = Sequence[Sequence[float]]


class PreferenceEvaluation(Evaluation):
    """Compares the margins of base and tuned model on pairs, and the losses of the chosen answers."""

    def measure(self) -> tuple[dict[str, Any], RowFigures]:
        with name_progress("tuned model"):
            tuned = score_row_logps(self.model, self.examples, self.collator)
        with self.model.disable_adapter(), name_progress("base"):
            base = score_row_logps(self.model, self.examples, self.collator)
        base_logps, tuned_logps = ([scores[i] for i in range(len(self.examples))] for scores in (base, tuned))
        result, figures, _ = measure_supervised_rows(self, AnswerSubset(self.examples, (0,)))
        preference = measure_preferences(self.examples, base_logps, tuned_logps, self.compare)
        for row, before, after in zip(figures, base_logps, tuned_logps, strict=True):
            row |= {"base_margin": before[0] - before[1], "tuned_margin": after[0] - after[1]}
        return {**result, "preference": preference, "prompt_dependence": None}, figures

    @staticmethod
    def list_reasons_not_passed(result: Mapping[str, Any]) -> list[str]:
        # The loss of the chosen answers may rise while they are preferred more.
        low, high = result["preference"]["margin_gain_ci95"]
        if low > 0:
            return []
        if low == high == 0:
            return ["the adapter changes nothing: base and tuned model have the same margins"]
        what = "prefers the chosen answers less than the base" if high < 0 else "is not shown to prefer them more"
        return [f"the tuned model {what}: its margin has changed by {format_interval(low, high)} nats per pair"]


def measure_preferences(
    examples: Sequence[Example], base: Logps, tuned: Logps, compare: Callable[..., PairedEstimate]
) -> dict[str, Any]:
    """Return the measures of pairs with intervals, `base_…`, `tuned_…` and `…_gain`, and those by length.

    Args:
        examples: the evaluated pairs, or ranked lists, of which all pairs with different scores count.
        base, tuned: log p of the answers of each example [N][K].
        compare: compares sums of each example [N] per size [N] with intervals (`Evaluation.compare`).
    """
    pairs = [(n, i, j) for n, e in enumerate(examples) for i, j in list_better_and_worse(e.get("row_scores"))]
    owners = np.array([n for n, _, _ in pairs])

    def take(values: Sequence[Sequence[float]]) -> np.ndarray:
        return np.array([[values[n][i], values[n][j]] for n, i, j in pairs], float)

    tokens = take([[count_targets({"labels": labels}) for _, labels in split_rows(e)] for e in examples])
    logps = {"base": take(base), "tuned": take(tuned)}

    def is_higher(values: np.ndarray) -> np.ndarray:
        return (values[:, 0] > values[:, 1]).astype(float)

    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "accuracy": is_higher,
        "token_accuracy": lambda values: is_higher(values / tokens),
        "margin": lambda values: values[:, 0] - values[:, 1],
    }
    result: dict[str, Any] = {"pairs": len(pairs)}
    for name, measure in measures.items():
        # More is better here, so the tuned model comes first: base - tuned is the gain.
        sums = (np.bincount(owners, measure(values)) for values in (logps["tuned"], logps["base"]))
        found = compare(*sums, np.bincount(owners))
        estimates = {f"base_{name}": found.second, f"tuned_{name}": found.first, f"{name}_gain": found.difference}
        result |= make_fields(**estimates)
    result["pairs_better"] = int(is_higher(logps["tuned"] - logps["base"]).sum())
    result["by_length"] = {}
    for name, part in (("chosen_longer", tokens[:, 0] > tokens[:, 1]), ("chosen_shorter", tokens[:, 0] < tokens[:, 1])):
        higher = {who: is_higher(values)[part] for who, values in logps.items()}
        means = {f"{who}_accuracy": float(values.mean()) if len(values) else None for who, values in higher.items()}
        result["by_length"][name] = {"pairs": int(part.sum()), **means}
    return result


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
    """Return the measures of answers with a label, with intervals: `base_…`, `tuned_…` and `…_gain` of the first two.

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
