"""Sampled answers: what rewards say of the answers of base and tuned model to held-out prompts.

    reward         mean over prompts of the mean reward of K sampled answers
    best reward    mean over prompts of the highest reward of the K answers: pass@K, if rewards are 0 or 1

Both models sample with the run's temperature, the same seeds and the same rewards. Intervals are paired over prompts.
"""

from typing import Any

import numpy as np
import torch

from ..core.adapters.active_adapters import BASE_ROW
from ..core.foundation.progress_bars import using_progress_prefix
from ..extras.rewards.reward_workers import RewardWorkers
from ..generation.policy_sampler import sample_policy_answers
from ..objectives.policy_objective import PolicyObjective
from ..objectives.policy_run import make_answers_to_score
from .estimate import Estimate
from .eval_result import PolicyEvalResult, PolicyMeasures
from .model_comparison import ModelComparison, RowFigures

PROMPTS_AT_ONCE = 32


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
        with using_progress_prefix("base"):
            base, base_length = self._sample_and_score(objective, workers, BASE_ROW)
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
        )
        means = zip(self.examples.lines, base.mean(1).tolist(), tuned.mean(1).tolist(), strict=True)
        return measures, [{"line": line, "base": before, "tuned": after} for line, before, after in means]

    def _sample_and_score(
        self, objective: PolicyObjective, workers: RewardWorkers, adapter_or_base: str
    ) -> tuple[np.ndarray, float]:
        """Return the reward of each answer [P, K], and the mean tokens of an answer."""
        sums, lengths = [], []
        for start in range(0, len(self.examples), PROMPTS_AT_ONCE):
            prompts = self.examples[start : start + PROMPTS_AT_ONCE]
            sampled = sample_policy_answers(
                self.model,
                self.tokenizer,
                [e["input_ids"] for e in prompts],
                adapter_or_base=adapter_or_base,
                count=objective.num_generations,
                temperature=float(objective.temperature),
                max_new_tokens=objective.max_completion_length,
                seed=(self.seed << 32) + start * objective.num_generations,
            )
            rewards = workers.score(make_answers_to_score(prompts, sampled, str(self.rows_source)))
            found = workers.sum_weighted(torch.tensor(rewards, dtype=torch.float64))
            sums.append(found.view(len(prompts), -1).numpy())
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
        if measures.best_reward_gain.high < 0:
            return ["the best of its answers to a prompt has become worse: it tries less than the base does"]
        return []
