"""Preferences on held-out pairs: how often and by how much base and tuned model prefer the chosen answer.

    accuracy          share of pairs with log p(chosen) > log p(rejected), summed over the tokens of an answer
    token_accuracy    the same per token of an answer, which does not favour the shorter one
    margin            mean of log p(chosen) − log p(rejected), in nats per pair

A pair on which the tuned model's margin is higher than the base's is one whose chosen answer has the higher reward in
TRL's sense (`rewards/accuracies`), with the base as the reference. Intervals are paired over pairs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.tokenized_dataset import Example, split_rows
from ..train_step.loss import count_targets
from .statistics import PairedEstimate, paired_bootstrap

Logps = Sequence[Sequence[float]]


def measure_preferences(
    pairs: Sequence[Example], base: Logps, tuned: Logps, groups: np.ndarray, *, draws: int, seed: int
) -> dict[str, Any]:
    """Return the measures of the module with intervals, `base_…`, `tuned_…` and `…_gain`, and those by length.

    Args:
        pairs: the evaluated pairs.
        base, tuned: log p of the two answers of each pair [N, 2].
        groups: the group of each pair; equal pairs are one group and are drawn together.
        draws, seed: of the bootstrap.
    """
    tokens = np.array([[count_targets({"labels": labels}) for _, labels in split_rows(e)] for e in pairs])
    counts = np.bincount(groups)
    result: dict[str, Any] = {"pairs": len(pairs)}

    def compare(name: str, measure: Callable[[np.ndarray], np.ndarray]) -> None:
        sums = [np.bincount(groups, measure(np.asarray(logps, float))) for logps in (tuned, base)]
        found: PairedEstimate = paired_bootstrap(sums[0], sums[1], counts, draws=draws, seed=seed)  # type: ignore[arg-type]
        # More is better here, so the tuned model comes first: base - tuned is the gain.
        estimates = {f"base_{name}": found.tuned, f"tuned_{name}": found.base, f"{name}_gain": found.difference}
        for key, estimate in estimates.items():
            result[key], result[f"{key}_ci95"] = estimate.value, estimate.interval

    def is_higher(values: np.ndarray) -> np.ndarray:
        return (values[:, 0] > values[:, 1]).astype(float)

    compare("accuracy", is_higher)
    compare("token_accuracy", lambda logps: is_higher(logps / tokens))
    compare("margin", lambda logps: logps[:, 0] - logps[:, 1])
    change = np.asarray(tuned, float) - np.asarray(base, float)
    result["pairs_better"] = int((change[:, 0] > change[:, 1]).sum())
    longer, shorter = tokens[:, 0] > tokens[:, 1], tokens[:, 0] < tokens[:, 1]
    result["by_length"] = {}
    for name, part in (("chosen_longer", longer), ("chosen_shorter", shorter)):
        higher = {who: is_higher(np.asarray(logps, float))[part] for who, logps in (("base", base), ("tuned", tuned))}
        means = {f"{who}_accuracy": float(values.mean()) if len(values) else None for who, values in higher.items()}
        result["by_length"][name] = {"pairs": int(part.sum()), **means}
    return result


def list_reasons_not_preferred(preference: dict[str, Any]) -> list[str]:
    """Return why the tuned model does not prefer the chosen answers more than the base does; empty if it does."""
    low, high = preference["margin_gain_ci95"]
    if low > 0:
        return []
    if low == high == 0:
        return ["the adapter changes nothing: base and tuned model have the same margins"]
    what = "prefers the chosen answers less than the base" if high < 0 else "is not shown to prefer them more"
    return [f"the tuned model {what}: its margin has changed by {low:.4f} to {high:.4f} nats per pair"]
