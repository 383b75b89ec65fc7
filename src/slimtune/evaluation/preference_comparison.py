"""Preferences: how well base and tuned model separate better answers from worse ones.

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

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..core.data.tokenized_dataset import Example, RankedAnswerSelection, list_tokens_and_labels_by_row
from ..core.foundation.progress_bars import using_progress_prefix
from ..core.training.loss import count_supervised_targets, score_row_logps_by_example_index
from ..errors import DataError
from ..objectives.pair_objective import list_preference_pair_indices
from .estimate import Estimate
from .eval_result import (
    KTOEvalResult,
    KTOMeasures,
    LengthSubsetAccuracy,
    PairPreferences,
    SFTMeasures,
    TextOrPairEvalResult,
    UnpairedPreferences,
)
from .model_comparison import ModelComparison, RowFigures
from .sft_comparison import measure_base_and_tuned_losses_and_scores
from .statistics import PairedEstimate, estimate_aucs_with_intervals, format_interval

Logps = Sequence[Sequence[float]]


class PreferenceComparison(ModelComparison[SFTMeasures]):
    """Compares the margins of base and tuned model on pairs, and the losses of the chosen answers."""

    result_type = TextOrPairEvalResult

    def measure(self) -> tuple[SFTMeasures, RowFigures]:
        with using_progress_prefix("tuned model"):
            tuned = score_row_logps_by_example_index(self.model, self.examples, self.collator)
        with self.model.disable_adapter(), using_progress_prefix("base"):
            base = score_row_logps_by_example_index(self.model, self.examples, self.collator)
        base_logps, tuned_logps = ([scores[i] for i in range(len(self.examples))] for scores in (base, tuned))
        measures, figures, _ = measure_base_and_tuned_losses_and_scores(
            self, RankedAnswerSelection(self.examples, (0,))
        )
        preference = measure_preferences(self.examples, base_logps, tuned_logps, self.compare)
        for row, before, after in zip(figures, base_logps, tuned_logps, strict=True):
            row |= {"base_margin": before[0] - before[1], "tuned_margin": after[0] - after[1]}
        return SFTMeasures(**vars(measures), preference=preference), figures

    @staticmethod
    def list_reasons_not_better(measures: SFTMeasures) -> list[str]:
        preference = measures.preference
        assert preference is not None
        # The loss of the chosen answers may rise while they are preferred more.
        low, high = preference.margin_gain.ci95
        same = all(gain.ci95 == (0, 0) for gain in (preference.accuracy_gain, preference.token_accuracy_gain))
        if low > 0 and same and preference.base_accuracy.value < 1:
            before = f"{100 * preference.base_accuracy.value:.1f} %"
            grown = format_interval(low, high)
            return [
                f"no pair changed sides: the margin grew by {grown} nats per pair, and {before} of the pairs "
                "prefer the chosen answer, as by the base"
            ]
        if low > 0:
            return []
        if low == high == 0:
            return ["the adapter changes nothing: base and tuned model have the same margins"]
        what = "prefers the chosen answers less than the base" if high < 0 else "is not shown to prefer them more"
        return [f"the tuned model {what}: its margin has changed by {format_interval(low, high)} nats per pair"]

    @staticmethod
    def list_warnings(measures: SFTMeasures) -> list[str]:
        pairs = measures.preference
        if pairs is None or pairs.accuracy_gain.low > 0 or pairs.base_accuracy.value >= 1:
            return []
        return ["by margins alone: that more pairs prefer the chosen answer is not shown"]


def measure_preferences(
    examples: Sequence[Example], base_logps: Logps, tuned_logps: Logps, compare: Callable[..., PairedEstimate]
) -> PairPreferences:
    """Return the measures of pairs with intervals, and those by length.

    Args:
        examples: the evaluated pairs, or ranked lists, of which all pairs with different scores count.
        base_logps, tuned_logps: log p of the answers of each example [N][K].
        compare: compares sums of each example [N] per size [N] with intervals (`ModelComparison.compare`).
    """
    pairs = [(n, i, j) for n, e in enumerate(examples) for i, j in list_preference_pair_indices(e.get("row_scores"))]
    owners = np.array([n for n, _, _ in pairs])

    def take(values: Sequence[Sequence[float]]) -> np.ndarray:
        return np.array([[values[n][i], values[n][j]] for n, i, j in pairs], float)

    tokens = take(
        [
            [count_supervised_targets({"labels": labels}) for _, labels in list_tokens_and_labels_by_row(e)]
            for e in examples
        ]
    )
    logps = {"base": take(base_logps), "tuned": take(tuned_logps)}

    def is_higher(values: np.ndarray) -> np.ndarray:
        return (values[:, 0] > values[:, 1]).astype(float)

    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "accuracy": is_higher,
        "token_accuracy": lambda values: is_higher(values / tokens),
        "margin": lambda values: values[:, 0] - values[:, 1],
    }
    estimates: dict[str, Estimate] = {}
    for name, measure in measures.items():
        # More is better here, so the tuned model comes first: base - tuned is the gain.
        sums = (np.bincount(owners, measure(values)) for values in (logps["tuned"], logps["base"]))
        found = compare(*sums, np.bincount(owners))
        estimates |= {f"base_{name}": found.second, f"tuned_{name}": found.first, f"{name}_gain": found.difference}
    by_length = {}
    for name, part in (("chosen_longer", tokens[:, 0] > tokens[:, 1]), ("chosen_shorter", tokens[:, 0] < tokens[:, 1])):
        base_mean, tuned_mean = (
            float(is_higher(logps[who])[part].mean()) if part.any() else None for who in ("base", "tuned")
        )
        by_length[name] = LengthSubsetAccuracy(
            pairs=int(part.sum()), base_accuracy=base_mean, tuned_accuracy=tuned_mean
        )
    better = int(is_higher(logps["tuned"] - logps["base"]).sum())
    return PairPreferences(pairs=len(pairs), **estimates, pairs_better=better, by_length=by_length)


class KTOEvaluator(ModelComparison[KTOMeasures]):
    """Compares how base and tuned model separate good answers from bad ones, and the losses of the good ones."""

    result_type = KTOEvalResult

    def measure(self) -> tuple[KTOMeasures, RowFigures]:
        is_good = np.array([e["label"] for e in self.examples], bool)
        if is_good.all() or not is_good.any():
            label = str(bool(is_good.all())).lower()
            hint = "--data FILE, or set more rows aside before training: --test-fraction 0.2"
            raise DataError(f"every evaluated row has the label {label}", "good and bad answers", hint)
        good, bad = (self.examples.select(np.flatnonzero(part)) for part in (is_good, ~is_good))
        measures, figures, scores_of_good = measure_base_and_tuned_losses_and_scores(replace(self, examples=good), good)
        base, tuned, tokens = np.zeros((3, len(is_good)))
        for part, (before, after) in ((is_good, scores_of_good), (~is_good, self.score_both(bad))):
            base[part], tuned[part] = ([-s.nats for s in scores] for scores in (before, after))
            tokens[part] = [s.tokens for s in before]
        options = {"draws": self.draws, "seed": self.seed}
        preferences = _measure_unpaired_preferences(base, tuned, tokens, is_good, self.groups, **options)
        measures = replace(measures, different_rows=len(np.unique(self.groups)))
        return KTOMeasures(**vars(measures), unpaired_preference=preferences), figures

    @staticmethod
    def list_reasons_not_better(measures: KTOMeasures) -> list[str]:
        preferences = measures.unpaired_preference
        low, high = preferences.reward_auc.ci95
        gains = (preferences.auc_gain, preferences.token_auc_gain)
        if low > 0.5 and all(gain.value <= 0 for gain in gains) and preferences.base_auc.value < 1:
            base, tuned = preferences.base_auc.value, preferences.tuned_auc.value
            return [
                "the tuned model tells good answers from bad ones no better than the base: the probability that a good "
                f"answer has the higher log p was {base:.3f} and is {tuned:.3f}"
            ]
        if low > 0.5:
            return []
        if preferences.good_reward == preferences.bad_reward == 0:
            return ["the adapter changes nothing: every answer has the reward 0"]
        what = "makes bad answers likelier" if high < 0.5 else "is not shown to tell good answers from bad ones"
        interval = f"with a probability of {low:.3f} to {high:.3f}, where chance is 0.5"
        return [f"the tuned model {what}: a good answer has a higher reward than a bad one {interval}"]

    @staticmethod
    def list_warnings(measures: KTOMeasures) -> list[str]:
        ratings = measures.unpaired_preference
        if max(ratings.auc_gain.low, ratings.token_auc_gain.low) > 0 or ratings.base_auc.value >= 1:
            return []
        return ["by rewards alone: that good answers are likelier than bad ones more often is not shown"]


def _measure_unpaired_preferences(
    base: np.ndarray,
    tuned: np.ndarray,
    tokens: np.ndarray,
    is_good: np.ndarray,
    groups: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> UnpairedPreferences:
    """Return the measures of answers with a label, with intervals.

    `base` and `tuned` are log p of each answer [N], `tokens` their numbers of tokens [N], `is_good` their labels, bool
    [N] and not all the same, and `groups` the groups of equal rows [N], which are drawn together.
    """
    rewards = tuned - base
    good_reward, bad_reward = (float(rewards[part].mean()) for part in (is_good, ~is_good))
    estimates: dict[str, Estimate] = {}
    for names, scores in (
        (("tuned_auc", "base_auc", "auc_gain"), [tuned, base]),
        (("tuned_token_auc", "base_token_auc", "token_auc_gain"), [tuned / tokens, base / tokens]),
        (("reward_auc",), [rewards]),
    ):
        found = estimate_aucs_with_intervals(np.stack(scores), is_good, groups, draws=draws, seed=seed)
        estimates |= dict(zip(names, found, strict=True))
    return UnpairedPreferences(
        good=int(is_good.sum()),
        bad=int((~is_good).sum()),
        **estimates,
        good_reward=good_reward,
        bad_reward=bad_reward,
        margin=good_reward - bad_reward,
    )
