"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers that are good or bad, one by one.

    r = log p(answer) − log p_ref(answer)

    kto                  good: w σ(−β (r − z))     bad: w σ(β (r − z))     w: desirable_weight, undesirable_weight
    apo_zero_unpaired    the same with z = 0                                                        (2408.06266)

z is the KL divergence of the model from its reference, estimated on the step's mismatched rows: the prompt of each row
with the answer to another one (mismatched_rows.py), z = max(0, mean of their r). It has no gradient. The loss of a
step is the mean over its rows.

This is `KTOTrainer` of TRL with the optimizer step as its batch: loss and gradient are equal if the batch is the step,
the answers are rotated by one place, and nothing is dropped out. TRL estimates z for each micro-batch, so that there it
depends on `gradient_accumulation_steps`; here all rows of a step have one z, whatever the micro-batches and processes.
It is computed in evaluation mode, as TRL's is with its default `disable_dropout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.adapters.config_fields import setting
from ..core.training.objective import Batch, Example, Objective, ScoreRows, sum_rows


@dataclass
class KTO(Objective):
    """KTO; TRL's names and defaults. Examples have `label`, whether the answer is good."""

    name: ClassVar[str] = "kto"
    summary: ClassVar[str] = "answers that are labelled good or bad, one by one, near the base"
    formats: ClassVar[tuple[str, ...]] = ("unpaired-preference",)
    needs_reference: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.1
    measures: ClassVar[tuple[str, ...]] = ("label", "log_ratio", "mismatched_log_ratio")

    beta: float = setting(0.1, "how near the model stays to its reference: larger is nearer", gt=0)
    desirable_weight: float = setting(1.0, "weight of the losses of good answers", ge=0)
    undesirable_weight: float = setting(1.0, "weight of the losses of bad answers", ge=0)
    loss_type: Literal["kto", "apo_zero_unpaired"] = setting("kto", "loss of a row")

    @property
    def needs_mismatched_rows(self) -> bool:
        return self.loss_type == "kto"

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the examples without their mismatched rows, and with the `kl` that is estimated on these."""
        if not self.needs_mismatched_rows:
            return examples
        own, mismatched = zip(*map(_split_example, examples), strict=True)
        logps = np.array(score_rows(mismatched))[:, 0]
        kl = max(0.0, float(np.mean(logps - np.array([e["reference"][1] for e in examples]))))
        return [e | {"kl": kl} for e in own]

    def row_losses(self, log_ratios: Tensor, labels: Tensor, kl: Tensor | float) -> Tensor:
        """Return the loss of each row [N]."""
        factors = [
            (1.0, self.undesirable_weight),
            (-1.0, self.desirable_weight),
        ]  # by label, of the dtype of the ratios
        sign, weights = log_ratios.new_tensor(factors)[labels.long()].unbind(1)
        return weights * torch.sigmoid(sign * self.beta * (log_ratios - kl))

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed losses of the micro-batch's rows, divided by the step's rows."""
        log_ratios = -sum_rows(values, batch) - batch["reference"][:, 0].to(values.dtype)
        kl = batch["kl"].to(values.dtype) if self.needs_mismatched_rows else 0.0
        return self.row_losses(log_ratios, batch["label"], kl).sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return label and log ratio of each row, and the log ratio of its mismatched row (0 without one)."""
        log_ratios = -sum_rows(values.double(), batch).view(len(batch["label"]), -1) - batch["reference"].double()
        label, unknown = batch["label"].double()[:, None], torch.zeros_like(log_ratios[:, :1])
        return torch.cat([label, log_ratios, unknown], dim=1)[:, : len(self.measures)]

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the loss, the KL estimate of all rows, and the mean rewards β · r of good and of bad answers."""
        label, log_ratios, mismatched = torch.from_numpy(scores).unbind(1)
        kl = max(0.0, float(mismatched.mean()))
        found = {"loss": float(self.row_losses(log_ratios, label, kl).mean()), "kl": kl}
        for name, part in (("chosen", label > 0), ("rejected", label == 0)):
            if part.any():
                found[f"rewards/{name}"] = float(self.beta * log_ratios[part].mean())
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def _split_example(example: Example) -> tuple[Example, Example]:
    """Return the row and the mismatched row of an example as examples of their own."""
    rest, end = {k: v for k, v in example.items() if k != "row_lengths"}, example["row_lengths"][0]
    tokens = {key: example[key] for key in ("input_ids", "labels")}
    own = rest | {key: values[:end] for key, values in tokens.items()}
    return own, {key: values[end:] for key, values in tokens.items()} | {"line": example["line"]}
