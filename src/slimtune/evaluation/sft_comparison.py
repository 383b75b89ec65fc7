"""Base against tuned model on answers, texts and documents: loss, perplexity, token accuracy, use of the prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation.progress_bars import using_progress_prefix
from .eval_result import LossMeasures, SFTMeasures, TextOrPairEvalResult
from .model_comparison import ModelComparison, RowFigures
from .prompt_dependence import MIN_DEPENDENCE, make_shuffled_prompt_examples, measure_prompt_dependence
from .row_scores import RowScore
from .statistics import compute_perplexity_interval, format_interval


class SupervisedLossEvaluator(ModelComparison[SFTMeasures]):
    """Compares the losses of base and tuned model on the supervised tokens."""

    result_type = TextOrPairEvalResult

    def measure(self) -> tuple[SFTMeasures, RowFigures]:
        measures, figures, (base, tuned) = measure_base_and_tuned_losses_and_scores(self, self.examples)
        dependence = None
        if self.shuffled_prompt_test and self.examples.documents is self.examples:  # a window has no prompt
            shuffled = make_shuffled_prompt_examples(self.examples, self.seed)
            draws = {"draws": self.draws, "seed": self.seed}
            with using_progress_prefix("answers after another row's prompt"):
                dependence = measure_prompt_dependence(shuffled, base, tuned, self.score_both, **draws)
        return SFTMeasures(**vars(replace(measures, prompt_dependence=dependence))), figures

    @staticmethod
    def list_warnings(measures: SFTMeasures) -> list[str]:
        if (documents := measures.windowed_documents) is None:
            return []
        of = "one document" if documents == 1 else f"{documents} documents"
        return [f"the rows are windows of {of}: how it does on other documents is not shown"]

    @staticmethod
    def list_reasons_not_better(measures: SFTMeasures) -> list[str]:
        failures = []
        low, high = measures.loss_reduction.ci95
        if low == high == 0 and measures.rows_better == 0:
            failures.append("the adapter changes nothing: base and tuned model have the same loss")
        elif low <= 0:
            what = "is worse than the base" if high < 0 else "is not shown to be better than the base"
            interval = f"its loss reduction is {format_interval(low, high)} nats per token"
            failures.append(f"the tuned model {what}: {interval}")
        dependence = measures.prompt_dependence
        if dependence is not None and not dependence.passed:
            low, high = dependence.tuned.ci95
            if low <= MIN_DEPENDENCE:
                failures.append(
                    "the prompt is not shown to help the tuned model predict its answer: by "
                    f"{format_interval(low, high)} nats per token, where more than {MIN_DEPENDENCE} is required"
                )
            else:
                low, high = dependence.change.ci95
                failures.append(
                    "the tuned model depends less on its prompts: the help of a prompt fell from "
                    f"{dependence.base.value:.4f} to {dependence.tuned.value:.4f} nats per token"
                    + (f", by {interval}" if " to " in (interval := format_interval(-high, -low)) else "")
                )
        return failures


def measure_base_and_tuned_losses_and_scores(
    comparison: ModelComparison[Any], examples: TokenizedDataset
) -> tuple[LossMeasures, RowFigures, tuple[list[RowScore], list[RowScore]]]:
    """Return loss, perplexity and token accuracy with intervals, the losses of each row, and its scores.

    `examples` are those of the comparison, or a row of each. A document is one row, whatever its windows, unless the
    documents are too few.
    """
    windows_are_rows = comparison.windows_are_rows
    owners = np.arange(len(examples)) if windows_are_rows else examples.owners

    def sum_windows(scores: Sequence[RowScore]) -> list[RowScore]:
        nats, hits, tokens = (np.bincount(owners, values) for values in zip(*scores, strict=True))
        return [RowScore(float(n), int(h), int(t)) for n, h, t in zip(nats, hits, tokens, strict=True)]

    base, tuned = map(sum_windows, comparison.score_both(examples))
    tokens = [score.tokens for score in base]
    loss = comparison.compare([s.nats for s in base], [s.nats for s in tuned], tokens)
    hits = comparison.compare([s.hits for s in tuned], [s.hits for s in base], tokens)
    measures = LossMeasures(
        rows=len(tokens),
        different_rows=len(np.unique(comparison.groups)),
        tokens=sum(tokens),
        base_loss=loss.first,
        tuned_loss=loss.second,
        loss_reduction=loss.difference,
        base_perplexity=compute_perplexity_interval(loss.first),
        tuned_perplexity=compute_perplexity_interval(loss.second),
        base_accuracy=hits.second,
        tuned_accuracy=hits.first,
        accuracy_gain=hits.difference,
        rows_better=sum(t.nats < b.nats for b, t in zip(base, tuned, strict=True)),
        windowed_documents=len(examples.documents) if windows_are_rows else None,
    )
    document_lines = examples.documents.lines
    lines = [document_lines[owner] for owner in examples.owners] if windows_are_rows else document_lines
    figures = [
        {"line": line, "tokens": b.tokens, "base": b.nats, "tuned": t.nats}
        for line, b, t in zip(lines, base, tuned, strict=True)
    ]
    return measures, figures, (base, tuned)
