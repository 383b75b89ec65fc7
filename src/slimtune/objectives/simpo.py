"""Simple preference optimization (Meng et al. 2024, arXiv 2405.14734): DPO without a reference.

    −log σ(β (log p(chosen) / tokens − log p(rejected) / tokens) − γ)

TRL has it as `CPOTrainer` with `loss_type="simpo"` and `cpo_alpha=0`. Its field names are taken, and the paper's size
of β, since TRL's default of 0.1 is CPO's. The loss of a step is the mean over its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.adapters.config_fields import config_field
from .pair_objective import RANKED_PAIRS, PairObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SimPO(PairObjective):
    """SimPO; names as in TRL's CPOConfig."""

    name: ClassVar[str] = "simpo"
    summary: ClassVar[str] = "to prefer the chosen answer per token, without a reference"

    beta: float = config_field(2.0, "scale of the rewards", gt=0)
    simpo_gamma: float = config_field(0.5, "margin that the chosen answer's reward must have", ge=0)
    label_smoothing: float = config_field(0.0, "probability that the two answers of a pair are swapped", ge=0, lt=0.5)

    pairs: Literal["all", "best-worst"] = config_field("all", RANKED_PAIRS)

    def pair_losses(self, logps: Tensor, tokens: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the losses [N] and the rewards β · log p per token [N, 2]."""
        import torch.nn.functional as F

        rewards = self.beta * logps / tokens.clamp_min(1)
        h = rewards[:, 0] - rewards[:, 1] - self.simpo_gamma
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h), rewards
