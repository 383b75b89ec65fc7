"""How much better an answer is than the other answers to its prompt: from rewards to advantages.

    group            (r − mean of the group) / (standard deviation of the group + 1e-4)           GRPO, 2402.03300
    batch            (r − mean of the group) / (standard deviation of the step + 1e-4)
    none             r − mean of the group                                                        Dr. GRPO, 2503.20783
    leave-one-out    r − mean of the other answers of the group                                   RLOO, 2402.14740

A group is the K answers to one prompt. Standard deviations have K − 1 in the denominator, as in TRL.
"""

from typing import Literal

import torch
from torch import Tensor

RewardScale = Literal["group", "batch", "none"]
SMALLEST_DEVIATION = 1e-4
"""What is added to a standard deviation before anything is divided by it."""


def compute_group_advantages(rewards: Tensor, scale: RewardScale = "group") -> Tensor:
    """Return the advantages [P, K] of K answers to each of P prompts from their rewards [P, K]."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return advantages
    deviation = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
    return advantages / (deviation + SMALLEST_DEVIATION)


def compute_leave_one_out_advantages(rewards: Tensor, normalize: bool = False) -> Tensor:
    """Return the advantages [P, K] of answers over the mean reward of the others; `normalize` over the whole step."""
    advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return scale_step_advantages(advantages) if normalize else advantages


def scale_step_advantages(advantages: Tensor) -> Tensor:
    """Return the advantages of a step [P, K] with a mean of 0 and a standard deviation of 1."""
    return (advantages - advantages.mean()) / (advantages.std() + SMALLEST_DEVIATION)


def find_groups_without_signal(rewards: Tensor) -> Tensor:
    """Return which prompts have answers of equal rewards, bool [P]: their advantages are all 0."""
    return torch.isclose(rewards.amax(1), rewards.amin(1))
