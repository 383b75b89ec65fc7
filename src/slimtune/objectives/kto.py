"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers that are good or bad, one by one.

    r = log p(answer) − log p_ref(answer)

    kto                  good: w σ(−β (r − z))     bad: w σ(β (r − z))     w: desirable_weight, undesirable_weight
    apo_zero_unpaired    the same with z = 0                                                        (2408.06266)

z is the KL divergence of the model from its reference, estimated on the step's mismatched rows: the prompt of each row
with the answer to another one, z = max(0, mean of their r). It has no gradient. The loss of a step is the mean over its
rows.

    rows of a step       x1 y1   x2 y2   x3 y3        x: prompt, y: everything from the first learned token on
    mismatched rows      x1 y3   x2 y1   x3 y2

A step has the same rows in every epoch, so that log p of its mismatched rows under the reference is computed once, and
the answers of the step's mismatched rows are those that the step learns (as in TRL). Rows are assigned to steps at
random; epochs have the steps in another order.

This is `KTOTrainer` of TRL with the optimizer step as its batch: loss and gradient are equal if the batch is the step,
the answers are rotated by one place, and nothing is dropped out. TRL estimates z for each micro-batch, so that there it
depends on `gradient_accumulation_steps`; here all rows of a step have one z, whatever the micro-batches and processes.
It is computed in evaluation mode, as TRL's is with its default `disable_dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core.adapters.config_fields import FieldError, config_field
from ..core.data.tokenized_dataset import IGNORE_INDEX, TokenizedDataset
from ..core.training.objective import Batch, Example, Objective, ScoreRows, sum_targets_by_row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.data.class_labels import ClassLabels
    from ..core.training.prepared_run import PreparedRun

NOTHING_LEARNED = ", as is undesirable_weight: nothing would be learned"
_MAX_PLACES = 16


@dataclass
class KTO(Objective):
    """KTO; TRL's names and defaults. Examples have `label`, whether the answer is good."""

    name: ClassVar[str] = "kto"
    summary: ClassVar[str] = "answers that are labelled good or bad, one by one, near the base"
    formats: ClassVar[tuple[str, ...]] = ("unpaired-preference",)
    learning_rate_factor: ClassVar[float] = 0.3
    measures: ClassVar[tuple[str, ...]] = ("label", "log_ratio", "mismatched_log_ratio")

    beta: float = config_field(0.1, "how near the model stays to its reference: larger is nearer", gt=0)
    desirable_weight: float = config_field(1.0, "weight of the losses of good answers", ge=0)
    undesirable_weight: float = config_field(1.0, "weight of the losses of bad answers", ge=0)
    loss_type: Literal["kto", "apo_zero_unpaired"] = config_field("kto", "loss of a row")

    def find_conflicts(self) -> Iterator[FieldError]:
        if not self.desirable_weight and not self.undesirable_weight:
            yield self.error("desirable_weight", "a weight above 0 for good or for bad answers", more=NOTHING_LEARNED)

    @property
    def needs_mismatched_rows(self) -> bool:
        """Whether the loss has the KL divergence of a step."""
        return self.loss_type == "kto"

    def list_plan_notes(self) -> Sequence[str]:
        if not self.needs_mismatched_rows:
            return ()
        return ("KTO runs a forward pass before each step, which takes about a quarter of the speed planned here.",)

    def prepare_rows(
        self, rows: TokenizedDataset, classes: ClassLabels | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return rows with `label`: whether the answer is good."""
        import numpy as np

        return rows.with_columns(label=np.array([names == [str(True)] for names in rows.classes], bool))

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Put the rows beside their mismatched ones, if the loss needs these, and compute the reference of both."""
        from .reference_logps import add_reference_logps

        data, settings, longest = prepared.data, prepared.settings, prepared.recipe.data.max_seq_len
        if self.needs_mismatched_rows:
            data.train, data.validation = (
                RowsWithMismatchedAnswers(rows, settings.rows_per_step, longest, settings.seed)
                for rows in (data.train, data.validation)
            )
        add_reference_logps(prepared)

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the examples without their mismatched rows, and with the `kl` that is estimated on these."""
        import numpy as np

        if not self.needs_mismatched_rows:
            return examples
        own, mismatched = zip(*map(_split_example, examples), strict=True)
        logps = np.array(score_rows(mismatched))[:, 0]
        kl = max(0.0, float(np.mean(logps - np.array([e["reference"][1] for e in examples]))))
        return [e | {"kl": kl} for e in own]

    def row_losses(self, log_ratios: Tensor, labels: Tensor, kl: Tensor | float) -> Tensor:
        """Return the loss of each row [N]."""
        import torch

        factors = [
            (1.0, self.undesirable_weight),
            (-1.0, self.desirable_weight),
        ]  # by label, of the dtype of the ratios
        sign, weights = log_ratios.new_tensor(factors)[labels.long()].unbind(1)
        return weights * torch.sigmoid(sign * self.beta * (log_ratios - kl))

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed losses of the micro-batch's rows, divided by the step's rows."""
        log_ratios = -sum_targets_by_row(values, batch) - batch["reference"][:, 0].to(values.dtype)
        kl = batch["kl"].to(values.dtype) if self.needs_mismatched_rows else 0.0
        return self.row_losses(log_ratios, batch["label"], kl).sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return label and log ratio of each row, and the log ratio of its mismatched row (0 without one)."""
        import torch

        log_ratios = (
            -sum_targets_by_row(values.double(), batch).view(len(batch["label"]), -1) - batch["reference"].double()
        )
        label, unknown = batch["label"].double()[:, None], torch.zeros_like(log_ratios[:, :1])
        return torch.cat([label, log_ratios, unknown], dim=1)[:, : len(self.measures)]

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the loss, the KL estimate of all rows, and the mean rewards β · r of good and of bad answers."""
        import torch

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


class RowsWithMismatchedAnswers(TokenizedDataset):
    """Rows in the order of their steps; each example is a row and its prompt with the answer of another row.

    The answers of a step are rotated by one place, or by as many as leave the fewest rows with an answer to their own
    prompt. If a step has one row, the answers of all rows are rotated together.

    Args:
        rows: tokenized examples of one row each.
        rows_per_step: rows of an optimizer step.
        max_seq_len: most tokens of a mismatched row; a longer one is truncated.
        seed: of the division into steps.
    """

    def __init__(self, rows: TokenizedDataset, rows_per_step: int, max_seq_len: int, seed: int) -> None:
        import numpy as np

        order = np.random.default_rng(seed).permutation(len(rows))
        vars(self).update(vars(rows.select(order)))  # the same table, its rows in this order
        self.rows_per_step, self.max_seq_len = rows_per_step, max_seq_len
        # Of an example no more than the prompt is kept: a hash of integers is the same in every process.
        examples = map(super().read, range(len(self)))
        prompts = np.array([hash(tuple(e["input_ids"][: _prompt_length(e)])) for e in examples])
        size = rows_per_step if rows_per_step > 1 else max(len(rows), 1)
        self._partners = np.arange(len(rows))
        for start in range(0, len(rows), size):
            block = np.arange(start, min(start + size, len(rows)))
            rotated = [np.roll(block, places) for places in range(1, min(len(block), _MAX_PLACES + 1))]
            if rotated:
                same = [(prompts[block] == prompts[other]).sum() for other in rotated]
                self._partners[block] = rotated[int(np.argmin(same))]
            elif start:  # the only row of the last step
                self._partners[block] = start - 1

    def shuffle(self, permute: Callable[[int], Any]) -> list[int]:
        """Return the order of the examples in an epoch: whole steps are permuted; a smaller one is the last."""
        whole, size = len(self) // self.rows_per_step, self.rows_per_step
        steps = (range(step * size, (step + 1) * size) for step in permute(whole).tolist())
        return [*(i for step in steps for i in step), *range(whole * size, len(self))]

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return the row and its mismatched row as one example."""
        own, other = super().read(number), super().read(int(self._partners[number]))
        answer = slice(_prompt_length(other), None)
        prompt = own["input_ids"][: _prompt_length(own)]
        ids = [*prompt, *other["input_ids"][answer]][: self.max_seq_len]
        labels = [*[IGNORE_INDEX] * len(prompt), *other["labels"][answer]][: self.max_seq_len]
        return own | {
            "input_ids": own["input_ids"] + ids,
            "labels": own["labels"] + labels,
            "row_lengths": [len(own["input_ids"]), len(ids)],
        }


def _prompt_length(example: Example) -> int:
    """Return the number of tokens before the first learned one; nothing predicts the first token of all."""
    return next(t for t, label in enumerate(example["labels"]) if t > 0 and label != IGNORE_INDEX)
