"""Whether the sampler is the model that trains: log p of each token where it was sampled, and where it is learned.

A sampler that runs without the adapter, with an old one, at another temperature or from another prompt still writes
plausible answers, and the loss looks fine. Only these two numbers of one token tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.training.objective import Batch
from ..errors import RunError

LARGEST_DIFFERENCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.5}
"""Nats that a token's log p may differ by, by the dtype of the base.

Both passes compute the same sums in another order: in fp32 SmolLM2 differs by 4e-5 at most, in bf16 by 0.04 on average
and by 0.5 at most.
"""
LIKELY_CAUSES = (
    "the sampler did not run what is trained: another adapter or none, older weights, another temperature or dtype, "
    "another prompt, or answers that were tokenized again"
)


@dataclass(frozen=True)
class AnswerDifference:
    """How far log p of an answer's tokens differ between the sampler and the trainer, in nats."""

    largest: float
    total: float
    tokens: int


class SamplerCheck:
    """Compares the answers of a step before they are learned; raises RunError if another model sampled them.

    Args:
        bound: largest difference of a token, in nats.
        tokenizer: names the token of an error.
        file: of the prompts.
    """

    def __init__(self, bound: float, tokenizer: Any, file: Path) -> None:
        self.bound, self.tokenizer, self.file = bound, tokenizer, file
        self.step = 0
        self.lines: Mapping[int, int] = {}
        self.differences: dict[int, AnswerDifference] = {}

    def begin_step(self, step: int, lines: Mapping[int, int]) -> None:
        """Forget the step before; `lines` are those of the prompts of the answers, by their number."""
        self.step, self.lines, self.differences = step, lines, {}

    def require_same_tokens(self, number: int, sampled: Sequence[int], learned: Sequence[int]) -> None:
        """Raise RunError unless the tokens that are learned of an answer are those that were sampled."""
        for at, (one, other) in enumerate(zip(sampled, learned, strict=False)):
            if one != other:
                self._fail(number, at, one, other, 0.0, 0.0)
        if len(sampled) != len(learned):
            raise RunError(
                f"step {self.step}: an answer to line {self.lines.get(number)} of {self.file} has {len(learned)} "
                f"learned tokens, and the sampler wrote {len(sampled)}: they differ from token "
                f"{min(len(sampled), len(learned)) + 1} on",
                "every sampled token is learned, the one that ends the answer included",
                code="sampler-differs",
            )

    def compare(self, logps: Tensor, batch: Batch) -> None:
        """Compare log p of a micro-batch's tokens [T], in the order of its targets, with what the sampler said.

        A micro-batch that is repeated, because memory ran out, counts once.
        """
        counts = batch["row_targets"]
        numbers, sampled = batch["answer"].tolist(), batch["sampled_count"].tolist()
        rows = zip(numbers, sampled, logps.split(counts), batch["targets"].split(counts), strict=True)
        for place, (number, count, own, targets) in enumerate(rows):
            ids = batch["sampled_tokens"][place, :count].tolist()
            self.require_same_tokens(number, ids, targets.tolist())
            said = batch["sampled_logps"][place, :count].to(own.dtype)
            differences = (own - said).abs()
            wrong = ~(differences <= self.bound)  # NaN, too
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                self._fail(number, at, ids[at], ids[at], float(said[at]), float(own[at]))
            self.differences[number] = AnswerDifference(float(differences.max()), float(differences.sum()), count)

    def _fail(self, number: int, at: int, sampled: int, learned: int, said: float, own: float) -> None:
        where = f"step {self.step}: token {at + 1} of an answer to line {self.lines.get(number)} of {self.file}"
        if sampled != learned:
            problem = f"{where} was sampled as {self._show(sampled)} and is learned as {self._show(learned)}"
        else:
            problem = (
                f"{where}, {self._show(sampled)}, was sampled with log p {said:.6f} and has {own:.6f} in the training "
                f"step: a difference of {abs(said - own):.3g}"
            )
        raise RunError(
            problem,
            f"at most {self.bound:g} nats (task.max_logp_difference): {LIKELY_CAUSES}",
            "resume from the last checkpoint; if it comes again, report it with this message",
            code="sampler-differs",
        )

    def _show(self, token: int) -> str:
        return f"{self.tokenizer.decode([token])!r} ({token})"
