"""Sampled answers: what rewards say of the answers of base and tuned model to held-out prompts.

    reward         mean over prompts of the mean reward of K sampled answers
    best reward    mean over prompts of the highest reward of the K answers: pass@K, if rewards are 0 or 1

Both models sample with the run's temperature, the same seeds and the same rewards. Intervals are paired over prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..core.adapters.active_adapters import BASE_ROW
from ..core.foundation.progress_bars import using_progress_prefix
from ..extras.rewards.reward_workers import RewardWorkers
from ..generation.policy_sampler import sample_policy_answers
from ..objectives.policy_objective import PolicyObjective
from ..objectives.reward_probes import DESCRIPTIONS, score_probes
from ..objectives.sampled_answers import PROMPTS_AT_ONCE, AnswerSampling, make_answers_to_score
from .estimate import Estimate
from .eval_result import PolicyEvalResult, PolicyMeasures, RewardProbe
from .model_comparison import ModelComparison, RowFigures


class SampledAnswerComparison(ModelComparison[PolicyMeasures]):
    """Compares the rewards of answers that base and tuned model sample."""

    result_type = PolicyEvalResult

    def measure(self) -> tuple[PolicyMeasures, RowFigures]:
        objective: Any = self.objective
        assert isinstance(objective, PolicyObjective)
        workers = RewardWorkers(objective.rewards, objective.reward_weights, float(objective.reward_timeout))
        (adapter,) = self.model.active_adapters
        with using_progress_prefix("tuned model"):
            tuned, tuned_length = self._sample_and_score(objective, workers, adapter)
        probes: dict[str, list[np.ndarray]] = {}
        with using_progress_prefix("base"):
            base, base_length = self._sample_and_score(objective, workers, BASE_ROW, probes)
        estimates: dict[str, Estimate] = {}
        for name, reduce in (("reward", np.mean), ("best_reward", np.max)):
            # More is better here, so the tuned model comes first.
            found = self.compare(reduce(tuned, axis=1), reduce(base, axis=1))
            estimates |= {f"base_{name}": found.second, f"tuned_{name}": found.first, f"{name}_gain": found.difference}
        measures = PolicyMeasures(
            rows=len(self.examples),
            different_rows=len(np.unique(self.groups)),
            answers=objective.num_generations,
            rewards=workers.names,
            **estimates,
            base_length=base_length,
            tuned_length=tuned_length,
            probes=[self._compare_probe(name, rewards, base) for name, rewards in probes.items()],
        )
        means = zip(self.examples.lines, base.mean(1).tolist(), tuned.mean(1).tolist(), strict=True)
        return measures, [{"line": line, "base": before, "tuned": after} for line, before, after in means]

    def _compare_probe(self, name: str, rewards: Sequence[np.ndarray], base: np.ndarray) -> RewardProbe:
        """Compare the rewards of a probe's answers [P, K] with those of the base's."""
        found = np.concatenate([*rewards])
        gain = self.compare(found.mean(axis=1), base.mean(axis=1)).difference
        return RewardProbe(name=name, answers=DESCRIPTIONS[name], reward=float(found.mean()), gain=gain)

    def _sample_and_score(
        self,
        objective: PolicyObjective,
        workers: RewardWorkers,
        adapter_or_base: str,
        probes: dict[str, list[np.ndarray]] | None = None,
    ) -> tuple[np.ndarray, float]:
        """Return the reward of each answer [P, K], and the mean tokens of an answer.

        `probes` gets the rewards of the answers of each probe; one that a reward raises an error on is left out.
        """
        sums, lengths = [], []
        for start in range(0, len(self.examples), PROMPTS_AT_ONCE):
            prompts = self.examples[start : start + PROMPTS_AT_ONCE]
            sampled = sample_policy_answers(
                self.model,
                self.tokenizer,
                [e["input_ids"] for e in prompts],
                AnswerSampling(
                    adapter_or_base,
                    objective.num_generations,
                    float(objective.temperature),
                    objective.max_completion_length,
                    seed=(self.seed << 32) + start * objective.num_generations,
                ),
            )
            rewards = workers.score(make_answers_to_score(prompts, sampled, str(self.rows_source)))
            found = workers.sum_weighted(torch.tensor(rewards, dtype=torch.float64))
            sums.append(found.view(len(prompts), -1).numpy())
            if probes is not None:
                scored = score_probes(objective, workers, prompts, sampled, str(self.rows_source))
                for name, values in scored.items():
                    probes.setdefault(name, []).append(values.numpy())
            lengths += [len(answer.token_ids) for answers in sampled for answer in answers]
        return np.concatenate(sums), sum(lengths) / len(lengths)

    @staticmethod
    def list_reasons_not_better(measures: PolicyMeasures) -> list[str]:
        low, high = measures.reward_gain.ci95
        if low > 0:
            return []
        if low == high == 0:
            return ["the adapter changes nothing that the rewards see: base and tuned model have the same reward"]
        what = "has a lower reward than the base" if high < 0 else "is not shown to have a higher reward"
        return [f"the tuned model {what}: it has changed by {low:.3f} to {high:.3f}"]

    @staticmethod
    def list_warnings(measures: PolicyMeasures) -> list[str]:
        found = [
            f"the rewards give {probe.answers} {probe.reward:.3f}, and the base's answers "
            f"{measures.base_reward.value:.3f}: a model can please them without being of use"
            for probe in measures.probes
            if probe.gain.low > 0
        ]
        if measures.best_reward_gain.high < 0:
            found.append("the best of its answers to a prompt has become worse: it tries less than the base does")
        return found
