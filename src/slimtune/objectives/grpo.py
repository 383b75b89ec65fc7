"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300): the model's own answers, scored by rewards.

    A        (r − mean of the group) / (standard deviation + 1e-4)      a group: the K answers to one prompt
    token    −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) + β ρ KL           ρ: p(token) / p where it was sampled

    grpo       mean over answers of the mean over their tokens
    dapo       sum over tokens / tokens of the step                     (2503.14476)
    bnpo       as dapo: TRL divides by the tokens of a micro-batch, and here micro-batches change no gradient
    dr_grpo    sum over tokens / (answers · max_completion_length)      (2503.20783, with scale_rewards none)

This is `GRPOTrainer` of TRL with one optimizer step for each sampling. The reference of the KL divergence is the model
without its adapter, or with the adapter that training continues from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.adapters.config_fields import config_field
from ..core.foundation.sequences import IGNORE_INDEX
from ..core.training.objective import Batch, Example
from .policy_objective import PolicyObjective

if TYPE_CHECKING:
    from torch import Tensor

    from .policy_losses import ClippedLosses


@dataclass
class GRPO(PolicyObjective):
    """Group relative policy optimization; TRL's names and defaults."""

    name: ClassVar[str] = "grpo"
    summary: ClassVar[str] = "prompts, whose answers the model samples and rewards score"

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = config_field("dapo", "how tokens' losses are averaged")
    scale_rewards: Literal["group", "batch", "none"] = config_field(
        "group", "rewards are divided by the standard deviation of the group, of the whole step, or not at all"
    )

    def compute_advantages(self, rewards: Tensor, summed_log_ratios: Tensor) -> Tensor:
        from .group_advantages import compute_group_advantages

        return compute_group_advantages(rewards, self.scale_rewards)

    def compute_clipped(self, logps: Tensor, old_logps: Tensor, batch: Batch) -> ClippedLosses:
        from .policy_losses import compute_clipped_losses, repeat_for_tokens

        advantages = repeat_for_tokens(batch["advantage"].to(logps.dtype), batch["row_targets"])
        return compute_clipped_losses(logps, old_logps, advantages, float(self.epsilon), self.high)

    def sum_losses(self, found: ClippedLosses, logps: Tensor, batch: Batch) -> Tensor:
        from .policy_losses import estimate_token_kl, remove_padding, sum_by_answer

        losses, counts = found.losses, batch["row_targets"]
        if self.beta:
            reference = remove_padding(batch["reference_logps"].to(logps.dtype), counts)
            losses = losses + float(self.beta) * found.ratios * estimate_token_kl(logps, reference)
        if self.loss_type == "grpo":
            return (sum_by_answer(losses, counts) / losses.new_tensor(counts)).sum()
        return losses.sum()

    def count_items(self, examples: Sequence[Example]) -> int:
        """Return the answers of the step, its tokens, or as many tokens as its answers may have."""
        if self.loss_type == "grpo":
            return len(examples)
        if self.loss_type == "dr_grpo":
            return len(examples) * self.max_completion_length
        return sum(label != IGNORE_INDEX for e in examples for label in e["labels"][1:])
