"""REINFORCE with a running baseline (Williams 1992): each answer against the mean reward of the steps before.

    r'      r − β (log p(answer) − log p_ref(answer))         where the answer was sampled
    A       r' − b                                            b: the baseline of the step
    b       mean r' of the first step, then  d b + (1 − d) mean r' of the step before
    loss    −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A)           ρ: p(answer) / p where it was sampled; mean over answers

One answer to each prompt is enough, so a step sees more prompts than one of GRPO or RLOO with as many answers. The
baseline knows nothing of the prompt: advantages vary more where prompts are of different difficulty. A checkpoint has
the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.adapters.config_fields import config_field
from ..core.config.schema import Number
from .rloo import RLOO

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.training.checkpoint import TrainingState


@dataclass
class Reinforce(RLOO):
    """REINFORCE with a running baseline."""

    name: ClassVar[str] = "reinforce"
    summary: ClassVar[str] = "prompts, as grpo, one answer each against the mean reward of the steps before"

    num_generations: int = config_field(1, "answers sampled to each prompt of a step", ge=1, le=1024)
    baseline_decay: Number = config_field(0.9, "share of the baseline that a step keeps", ge=0, lt=1)

    def compute_advantages(self, rewards: Tensor, summed_log_ratios: Tensor) -> Tensor:
        from .group_advantages import scale_step_advantages

        penalized = rewards - float(self.beta) * summed_log_ratios
        mean = float(penalized.mean())
        baseline = mean if self.run is None else self._update_baseline(self.run.prepared.state, mean)
        advantages = penalized - baseline
        return scale_step_advantages(advantages) if self.normalize_advantages else advantages

    def find_prompts_without_signal(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Return for each prompt whether all answers of the step have one reward, bool [P].

        Then only the penalty of `beta` would be learned. An answer that is the only one is compared with the baseline.
        """
        spread = rewards.amax() - rewards.amin() if rewards.numel() > 1 else advantages.abs().amax()
        return (spread < 1e-12).expand(len(rewards))

    def _update_baseline(self, state: TrainingState, mean: float) -> float:
        """Return the baseline of the step that begins, and keep what the next one needs; a repeated step has the same.

        A checkpoint that is written in the middle of a step is one of the steps before.
        """
        kept = state.objective_state
        if kept.get("step") != state.step:
            before = kept.get("next_baseline", mean)
            decay = float(self.baseline_decay)
            state.objective_state = kept = {
                "step": state.step,
                "baseline": before,
                "next_baseline": decay * before + (1 - decay) * mean,
            }
        return kept["baseline"]
