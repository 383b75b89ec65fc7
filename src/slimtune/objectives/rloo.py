"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): each answer against the others.

    r'      r − β (log p(answer) − log p_ref(answer))         where the answer was sampled
    A       r' − mean r' of the other answers to the prompt
    loss    −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A)           ρ: p(answer) / p where it was sampled; mean over answers

This is `RLOOTrainer` of TRL with one optimizer step for each sampling. Without a gradient step in between ρ is 1, and
the gradient is that of REINFORCE with this baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..core.training.objective import Batch
from .policy_objective import PolicyObjective

if TYPE_CHECKING:
    from torch import Tensor

    from .policy_losses import ClippedLosses


@dataclass
class RLOO(PolicyObjective):
    """REINFORCE leave-one-out; TRL's names and defaults, but 8 answers to each prompt."""

    name: ClassVar[str] = "rloo"
    summary: ClassVar[str] = "prompts, as grpo, each answer against the mean of the others"

    beta: Number = config_field(0.05, "weight of the log ratio to the base in the reward; 0: none", ge=0)
    normalize_advantages: bool = config_field(False, "scale the advantages of a step to a standard deviation of 1")

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.vllm_importance_sampling_mode.startswith("token"):
            expected = "sequence_mask or sequence_truncate: the loss has one ratio for the whole answer"
            yield self.error("vllm_importance_sampling_mode", expected)

    def compute_advantages(self, rewards: Tensor, summed_log_ratios: Tensor) -> Tensor:
        from .group_advantages import compute_leave_one_out_advantages

        penalized = rewards - float(self.beta) * summed_log_ratios
        return compute_leave_one_out_advantages(penalized, self.normalize_advantages)

    def compute_clipped(self, logps: Tensor, old_logps: Tensor, batch: Batch) -> ClippedLosses:
        from .policy_losses import compute_clipped_losses, sum_by_answer

        own, old = (sum_by_answer(values, batch["row_targets"]) for values in (logps, old_logps))
        return compute_clipped_losses(own, old, batch["advantage"].to(logps.dtype), float(self.epsilon), self.high)

    def sum_losses(self, found: ClippedLosses, logps: Tensor, batch: Batch) -> Tensor:
        return found.losses.sum()
