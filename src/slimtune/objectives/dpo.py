"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), with the losses of TRL's `DPOTrainer`.

    h = (log p(chosen) − log p_ref(chosen)) − (log p(rejected) − log p_ref(rejected))

    sigmoid        −log σ(β h)
    hinge          max(0, 1 − β h)                                                       (SLiC, 2305.10425)
    ipo            (h̄ − 1 / 2β)²                h̄: each log ratio divided by its tokens  (2310.12036)
    sigmoid_norm   −log σ(β h̄)
    robust         (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε)   ε: label_smoothing (2403.00409)

The reference is the model without the adapter, or with the adapter that training continues from. Its log p are computed
once, before training. The loss of a step is the mean over its pairs; a list of K answers has up to K (K - 1) / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.adapters.config_fields import FieldError, config_field
from .pair_objective import RANKED_PAIRS, PairObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DPO(PairObjective):
    """Direct preference optimization; TRL's names and defaults."""

    name: ClassVar[str] = "dpo"
    summary: ClassVar[str] = "to prefer the chosen answer to the rejected one, near the base"
    needs_reference: ClassVar[bool] = True

    beta: float = config_field(0.1, "how near the model stays to its reference: larger is nearer", gt=0)
    loss_type: Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "robust"] = config_field("sigmoid", "loss of a pair")
    label_smoothing: float = config_field(
        0.0, "with loss_type robust: probability that the two answers of a pair are swapped", ge=0, lt=0.5
    )

    pairs: Literal["all", "best-worst"] = config_field("all", RANKED_PAIRS)

    def find_conflicts(self) -> Iterator[FieldError]:
        if self.label_smoothing and self.loss_type != "robust":
            more = f", and loss_type {self.loss_type} has none"
            yield self.error("label_smoothing", "loss_type robust, or label_smoothing 0", more=more)

    def pair_losses(self, logps: Tensor, tokens: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the losses [N] and the rewards β · (log p − log p_ref) [N, 2]."""
        import torch
        import torch.nn.functional as F

        assert reference is not None
        log_ratios = logps - reference
        ratios = log_ratios / tokens.clamp_min(1) if self.loss_type in ("ipo", "sigmoid_norm") else log_ratios
        h = ratios[:, 0] - ratios[:, 1]
        if self.loss_type == "hinge":
            losses = torch.relu(1 - self.beta * h)
        elif self.loss_type == "ipo":
            losses = (h - 1 / (2 * self.beta)) ** 2
        else:
            e = self.label_smoothing
            losses = -F.logsigmoid(self.beta * h)
            if e:
                losses = ((1 - e) * losses + e * F.logsigmoid(-self.beta * h)) / (1 - 2 * e)
        return losses, self.beta * log_ratios
