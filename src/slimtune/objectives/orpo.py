"""Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): cross-entropy and preference in one step.

    −log p of the chosen answers' tokens, their mean over the step  −  β · mean of log σ(log odds ratio)
    log odds ratio = log(p_c / (1 − p_c)) − log(p_r / (1 − p_r))        p: geometric mean of an answer's probabilities

It has no reference. TRL's `ORPOTrainer` also learns the prompts' tokens; as in the paper, only answers are learned
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.adapters.config_fields import config_field
from ..core.foundation.sequences import IGNORE_INDEX
from ..core.training.objective import Batch, Example, sum_targets_by_row
from .pair_objective import PairObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ORPO(PairObjective):
    """ORPO; TRL's names and defaults."""

    name: ClassVar[str] = "orpo"
    summary: ClassVar[str] = "the chosen answers, and to prefer them, in one run without a reference"

    formats: ClassVar[tuple[str, ...]] = ("preference",)

    beta: float = config_field(0.1, "weight of the preference beside the cross-entropy (λ of the paper)", ge=0)

    def count_items(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Return the number of pairs and of the supervised tokens of their chosen answers."""
        chosen = [e["labels"][1 : e["row_lengths"][0]] for e in examples]
        return len(examples), sum(label != IGNORE_INDEX for labels in chosen for label in labels)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the micro-batch's share of both parts."""
        pairs, tokens = num_items
        chosen_nll = sum_targets_by_row(values, batch).view(-1, 2)[:, 0]
        return chosen_nll.sum() / tokens + self._odds_losses(values, batch)[0].sum() / pairs

    def pair_losses(self, logps: Tensor, tokens: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of both parts, the cross-entropy per token of its pair [N], and the rewards [N, 2]."""
        mean = logps / tokens.clamp_min(1)
        losses, rewards = self._compare(mean)
        return losses - mean[:, 0], rewards

    def _odds_losses(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        tokens = torch.tensor(batch["row_targets"], dtype=values.dtype, device=values.device)
        return self._compare((-sum_targets_by_row(values, batch) / tokens.clamp_min(1)).view(-1, 2))

    def _compare(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        import torch
        import torch.nn.functional as F

        # log(1 − p) of p near 1 needs expm1.
        log_odds = mean - torch.log(-torch.expm1(mean.clamp_max(-torch.finfo(mean.dtype).tiny)))
        return -self.beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), self.beta * mean
