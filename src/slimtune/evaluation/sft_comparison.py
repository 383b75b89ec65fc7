"""Evaluation of answers, texts and documents: loss, perplexity and token accuracy, and the use of the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation.progress_bars import name_progress
from ..core.training.loss import RowScore
from .model_comparison import Evaluation, RowFigures
from .prompt_dependence import MIN_DEPENDENCE, prompt_dependence, shuffle_prompts
from .statistics import Estimate, format_interval, make_fields, perplexity


class SupervisedEvaluation(Evaluation):
    """Compares the losses of base and tuned model on the supervised tokens."""

    def measure(self) -> tuple[dict[str, Any], RowFigures]:
        result, figures, (base, tuned) = measure_supervised_rows(self, self.examples)
        dependence = None
        if self.prompt_test and self.examples.documents is self.examples:  # a window has no prompt
            shuffled = shuffle_prompts(self.examples, self.seed)
            draws = {"draws": self.draws, "seed": self.seed}
            with name_progress("answers after another row's prompt"):
                dependence = prompt_dependence(shuffled, base, tuned, self.score_both, **draws)
        return {**result, "preference": None, "prompt_dependence": dependence}, figures

    @staticmethod
    def list_reasons_not_passed(result: Mapping[str, Any]) -> list[str]:
        failures = []
        low, high = result["loss_reduction_ci95"]
        if low == high == 0 and result.get("rows_better") == 0:
            failures.append("the adapter changes nothing: base and tuned model have the same loss")
        elif low <= 0:
            what = "is worse than the base" if high < 0 else "is not shown to be better than the base"
            interval = f"its loss reduction is {format_interval(low, high)} nats per token"
            failures.append(f"the tuned model {what}: {interval}")
        dependence = result["prompt_dependence"]
        if dependence is not None and not dependence["passed"]:
            low, high = dependence["tuned_ci95"]
            if low <= MIN_DEPENDENCE:
                failures.append(
                    "the prompt is not shown to help the tuned model predict its answer: by "
                    f"{format_interval(low, high)} nats per token, where more than {MIN_DEPENDENCE} is required"
                )
            else:
                low, high = dependence["change_ci95"]
                failures.append(
                    "the tuned model depends less on its prompts: the help of a prompt fell from "
                    f"{dependence['base']:.4f} to {dependence['tuned']:.4f} nats per token"
                    + (f", by {interval}" if " to " in (interval := format_interval(-high, -low)) else "")
                )
        return failures


def measure_supervised_rows(
    evaluation: Evaluation, examples: TokenizedDataset
) -> tuple[dict[str, Any], RowFigures, tuple[list[RowScore], list[RowScore]]]:
    """Return loss, perplexity and token accuracy with intervals, the losses of each row, and its scores.

    `examples` are those of the evaluation, or a row of each. A document is one row, whatever its windows.
    """

    def sum_windows(scores: Sequence[RowScore]) -> list[RowScore]:
        nats, hits, tokens = (np.bincount(examples.owners, values) for values in zip(*scores, strict=True))
        return [RowScore(float(n), int(h), int(t)) for n, h, t in zip(nats, hits, tokens, strict=True)]

    base, tuned = map(sum_windows, evaluation.score_both(examples))
    tokens = [score.tokens for score in base]
    loss = evaluation.compare([s.nats for s in base], [s.nats for s in tuned], tokens)
    hits = evaluation.compare([s.hits for s in tuned], [s.hits for s in base], tokens)
    perplexities = [Estimate(*map(perplexity, estimate)) for estimate in (loss.first, loss.second)]

    result = {
        "rows": len(tokens),
        "tokens": sum(tokens),
        **make_fields(base_loss=loss.first, tuned_loss=loss.second, loss_reduction=loss.difference),
        **make_fields(base_perplexity=perplexities[0], tuned_perplexity=perplexities[1]),
        **make_fields(base_accuracy=hits.second, tuned_accuracy=hits.first, accuracy_gain=hits.difference),
        "rows_better": sum(t.nats < b.nats for b, t in zip(base, tuned, strict=True)),
        "different_rows": len(np.unique(evaluation.groups)),
    }
    figures = [
        {"line": line, "tokens": b.tokens, "base": b.nats, "tuned": t.nats}
        for line, b, t in zip(examples.documents.lines, base, tuned, strict=True)
    ]
    return result, figures, (base, tuned)
