"""Reward modelling: the better of two answers gets the higher reward, by a head on each answer's last token.

loss = mean over pairs of −log σ(r(chosen) − r(rejected)) + c · (r(chosen) + r(rejected))²

Bradley and Terry, 1952; the centring of rewards: Eisenstein et al., 2023 (arXiv:2312.09244). Names are TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core.adapters.config_fields import config_field
from ..core.training.objective import Batch, Objective

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.config import Recipe
    from ..core.training.datasets import RunDatasets


@dataclass
class Reward(Objective):
    """The Bradley-Terry loss of pairs, the chosen answer first."""

    name: ClassVar[str] = "reward"
    summary: ClassVar[str] = "rewards from preference pairs, by a head on the last token"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    rows_per_example: ClassVar[int] = 2
    task_type: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS"]] = "SEQ_CLS"
    measures: ClassVar[tuple[str, ...]] = ("nats", "chosen", "rejected")

    center_rewards_coefficient: float | None = config_field(
        None,
        "weight of the squared sum of a pair's rewards, which keeps their mean near 0 (0.01)",
        when_null="none",
        ge=0,
    )

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return the rows as they are, for a head with one output."""
        from ..core.data.class_labels import ClassLabels

        return replace(datasets, classes=ClassLabels())

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        return self.pair_losses(values).sum() / num_items

    def pair_losses(self, values: Tensor) -> Tensor:
        """Return the loss of each pair [N] from the rewards of its two rows, neighbours in `values` [2N, 1]."""
        import torch.nn.functional as F

        chosen, rejected = values.view(-1, 2).unbind(1)
        losses = -F.logsigmoid(chosen - rejected)
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected) ** 2
        return losses

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the loss and both rewards of each pair."""
        import torch

        return torch.cat([self.pair_losses(values).double()[:, None], values.double().view(-1, 2)], dim=1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the loss, the share of pairs whose chosen answer has the higher reward, and the mean difference."""
        nats, chosen, rejected = scores.T
        return {
            "loss": float(nats.mean()),
            "accuracy": float((chosen > rejected).mean()),
            "margin": float((chosen - rejected).mean()),
        }
