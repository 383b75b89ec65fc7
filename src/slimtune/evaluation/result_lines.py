"""What an evaluation says, as lines and tables: the terminal and the pages print the same ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .estimate import Estimate
from .eval_result import (
    AnswerPair,
    BaseAndTunedAnswerMeasure,
    ClassificationEvalResult,
    ClassificationMeasures,
    ContextMeasures,
    EvalResult,
    EvalVerdict,
    ForgettingMeasures,
    KTOEvalResult,
    LmEvalTaskScores,
    LossMeasures,
    PairPreferences,
    PolicyEvalResult,
    PromptDependence,
    RewardEvalResult,
    TextEvalResult,
    TextOrPairEvalResult,
    UnpairedPreferences,
    WinRate,
)

MAX_MISTAKES = 8
"""Lines in place of a confusion table that is too wide."""


@dataclass(frozen=True)
class ResultTable:
    """A table of a result."""

    columns: Sequence[str]
    """Headings of the columns."""
    rows: Sequence[Sequence[str]]
    """Cells by row."""
    text_columns: Sequence[int] = ()
    """Columns beside the first whose cells are texts; the others are numbers."""

    @property
    def width(self) -> int:
        """Characters of a line with every cell in full, with two blanks between columns."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        return sum(widths) + 2 * (len(widths) - 1)


@dataclass(frozen=True)
class ResultHeading:
    """A heading within a result."""

    text: str


ResultLine = str | ResultHeading | ResultTable
"""A sentence ("" for a blank line), a heading, or a table."""


def list_eval_result_lines(result: EvalResult, width: int) -> list[ResultLine]:
    """Return what is said of an evaluation, its verdict last; no table but that of losses is wider than `width`."""
    if isinstance(result, TextEvalResult):
        lines, better = [*_list_text_lines(result)], "the tuned model is better"
    elif isinstance(result, PolicyEvalResult):
        lines, better = [*_list_policy_lines(result)], "the tuned model is better"
    else:
        lines, better = [*_list_head_lines(result, width)], "the model is better than its baseline"
    return [*lines, _describe_verdict(result.verdict, better)]


def _list_text_lines(result: TextEvalResult) -> Iterator[ResultLine]:
    measures = result.measures
    yield _make_loss_table(measures)
    yield (
        f"loss reduction in 95 % of bootstrap draws: {measures.loss_reduction.low:.4f} to "
        f"{measures.loss_reduction.high:.4f}, over {measures.rows} rows, {measures.tokens} supervised tokens"
    )
    if isinstance(result, TextOrPairEvalResult) and result.measures.preference is not None:
        yield from _list_pair_lines(result.measures.preference)
    if isinstance(result, TextOrPairEvalResult) and result.measures.context is not None:
        yield from list_context_lines(result.measures.context)
    if isinstance(result, KTOEvalResult):
        yield from _list_unpaired_lines(result.measures.unpaired_preference)
    if measures.prompt_dependence is not None:
        yield _describe_prompt_dependence(measures.prompt_dependence)
    if result.forgetting is not None:
        yield _describe_forgetting(result.forgetting)
    if result.training_rows:
        yield _describe_training_rows(result.training_rows)
    if measures.different_rows < measures.rows:
        yield f"only {measures.different_rows} of the {measures.rows} rows differ from each other"
    answers = result.generations or ()
    for answer in answers:
        yield from _list_answer_lines(answer)
    if result.generation_summary:
        yield from ("", make_answer_check_table(result.generation_summary, answers))
    if result.win_rate is not None:
        yield from ("", describe_win_rate(result.win_rate))
    if result.tasks:
        yield from ("", _make_task_table(result.tasks))


def list_context_lines(context: ContextMeasures) -> Iterator[str]:
    """Yield what is said of the context: what it gains, what is kept of that, and what is saved without it."""
    whose = "the base's own answers with the context" if context.sampled_answers else "the rows' answers"
    yield f"with the context the base has a loss of {_format_estimate(context.loss, 4)} on {whose}"
    saved = f"a prompt has {context.tokens_saved:.0f} tokens fewer without the context"
    if (short := context.prefill_seconds) is not None and (long := context.prefill_seconds_with_context) is not None:
        saved += f": it is read in {1000 * short:.3g} ms in place of {1000 * long:.3g} ms"
    yield saved
    if context.kept is None:
        yield f"the context does not help: it changes the base's loss by {-context.gain.value:+.4f} nats per token"
        return
    kept = f"{100 * context.kept.value:.1f} % ({100 * context.kept.low:.1f} to {100 * context.kept.high:.1f})"
    yield f"without it the tuned model keeps {kept} of its gain of {_format_estimate(context.gain, 4)} nats per token"


def _list_policy_lines(result: PolicyEvalResult) -> Iterator[ResultLine]:
    m = result.measures
    rows = [
        (who, _format_estimate(reward, 3), _format_estimate(best, 3), length)
        for who, reward, best, length in (
            ("base", m.base_reward, m.base_best_reward, f"{m.base_length:.0f}"),
            ("tuned", m.tuned_reward, m.tuned_best_reward, f"{m.tuned_length:.0f}"),
            ("gain", m.reward_gain, m.best_reward_gain, f"{m.tuned_length - m.base_length:+.0f}"),
        )
    ]
    yield ResultTable(("", "reward (95 % interval)", f"best of {m.answers}", "tokens"), rows)
    sampled = "one sampled answer" if m.answers == 1 else f"{m.answers} sampled answers"
    yield f"{sampled} to each of {m.rows} held-out prompts, scored by {', '.join(m.rewards)}"
    if m.probes:
        above = {p.name: " (more than the base's answers)" for p in m.probes if p.gain.low > 0}
        probes = (f"{p.name} {p.reward:.3f}{above.get(p.name, '')}" for p in m.probes)
        yield "answers without any worth get: " + ", ".join(probes)
    if result.forgetting is not None:
        yield _describe_forgetting(result.forgetting)
    if result.training_rows:
        yield _describe_training_rows(result.training_rows)


def _list_head_lines(result: EvalResult, width: int) -> Iterator[ResultLine]:
    if isinstance(result, RewardEvalResult):
        reward = result.measures
        rows = [
            ("accuracy", _format_share(reward.accuracy)),
            ("chance", f"{100 * reward.baseline_accuracy:.1f} %"),
            ("margin", _format_estimate(reward.margin, 3)),
            ("loss", f"{reward.loss:.4f}"),
        ]
        yield ResultTable((f"{reward.rows} pairs", "(95 % interval)"), rows)
    elif isinstance(result, ClassificationEvalResult):
        measures = result.measures
        rows = [
            ("accuracy", _format_share(measures.accuracy)),
            (f"always {measures.baseline!r}", f"{100 * measures.baseline_accuracy:.1f} %"),
            ("macro-F1", _format_estimate(measures.macro_f1, 3)),
            ("loss", f"{measures.loss:.4f}"),
        ]
        yield ResultTable((f"{measures.rows} rows", "(95 % interval)"), rows)
        yield make_class_table(measures)
        if (confusion := make_confusion_table(measures)) is not None:
            yield confusion if confusion.width <= width else _make_mistake_table(measures)
    if result.training_rows:
        yield _describe_training_rows(result.training_rows)


def _describe_verdict(verdict: EvalVerdict, better: str) -> str:
    """Return the last line: what is `better` if the evaluation passes, else the reasons why it does not."""
    if not verdict.passed:
        return f"verdict: no: {'; '.join(verdict.reasons)}"
    return f"verdict: {better}" + (f", but {verdict.warning}" if verdict.warning else "")


# --- losses and preferences ------------------------------------------------------------------------------------------


def _make_loss_table(measures: LossMeasures) -> ResultTable:
    """Return loss, perplexity and token accuracy of base and tuned model, and what was gained."""
    models = (
        ("base", measures.base_loss, measures.base_perplexity, measures.base_accuracy),
        ("tuned", measures.tuned_loss, measures.tuned_perplexity, measures.tuned_accuracy),
    )
    rows = [
        (
            who,
            f"{loss.value:.4f}",
            "inf" if perplexity is None else f"{perplexity.value:.2f}",
            f"{100 * accuracy.value:.1f} %",
        )
        for who, loss, perplexity, accuracy in models
    ]
    gain = f"{100 * measures.accuracy_gain.value:.1f} %"
    rows.append(("loss reduction", f"{measures.loss_reduction.value:.4f}", "", gain))
    return ResultTable(("", "loss (nats/token)", "perplexity", "token accuracy"), rows)


def _list_pair_lines(preference: PairPreferences) -> Iterator[ResultLine]:
    p = preference
    models = (
        ("base", p.base_accuracy, p.base_token_accuracy, p.base_margin),
        ("tuned", p.tuned_accuracy, p.tuned_token_accuracy, p.tuned_margin),
    )
    rows = [
        (who, f"{100 * accuracy.value:.1f} %", f"{100 * per_token.value:.1f} %", f"{margin.value:.3f}")
        for who, accuracy, per_token, margin in models
    ]
    yield from ("", "the losses are those of the chosen answers; how the model prefers them to the rejected ones:")
    yield ResultTable(("", "chosen preferred", "per token", "margin (nats/pair)"), rows)
    low, high = (f"{100 * end:.1f}" for end in p.accuracy_gain.ci95)
    yield (
        f"margin gained in 95 % of bootstrap draws: {p.margin_gain.low:.3f} to {p.margin_gain.high:.3f}; accuracy "
        f"gained: {100 * p.accuracy_gain.value:.1f} % ({low} to {high}), over {p.pairs} pairs; the margin rose on "
        f"{p.pairs_better}"
    )
    for name, part in p.by_length.items():
        if part.base_accuracy is not None and part.tuned_accuracy is not None:
            yield (
                f"{name.replace('_', ' ')} ({part.pairs} pair{'s' * (part.pairs != 1)}): base prefers it in "
                f"{100 * part.base_accuracy:.0f} %, tuned in {100 * part.tuned_accuracy:.0f} %"
            )


def _list_unpaired_lines(preferences: UnpairedPreferences) -> Iterator[ResultLine]:
    p = preferences
    rows = [
        ("base", f"{p.base_auc.value:.3f}", f"{p.base_token_auc.value:.3f}"),
        ("tuned", f"{p.tuned_auc.value:.3f}", f"{p.tuned_token_auc.value:.3f}"),
    ]
    yield ""
    yield (
        "the losses are those of the good answers; how often a good answer is likelier than a bad one, over "
        f"{p.good} good and {p.bad} bad ones (AUC; chance is 0.5):"
    )
    yield ResultTable(("", "log p", "per token"), rows)
    yield (
        f"a good answer has a higher reward (log p tuned - log p base) than a bad one: "
        f"{_format_estimate(p.reward_auc, 4)}; mean rewards in nats: good {p.good_reward:.3f}, bad {p.bad_reward:.3f}"
    )


def _describe_prompt_dependence(dependence: PromptDependence) -> str:
    """Return how much the loss of an answer rises after another row's prompt."""
    return (
        "use of the prompt: after another row's prompt the loss of an answer is higher by "
        f"{dependence.base.value:.4f} nats per token for the base, by {_format_estimate(dependence.tuned, 4)} for the "
        "tuned model"
    )


def _describe_forgetting(forgetting: ForgettingMeasures) -> str:
    """Return how much the loss on general text changed, and whether that is allowed."""
    change = forgetting.change
    rose = change.value > 0
    low, high = (change.low, change.high) if rose else (-change.high, -change.low)
    if not forgetting.within:
        words = "too much was forgotten"
    elif change.low > 0:
        words = "no more was forgotten than is allowed"
    else:
        words = "nothing is shown to be forgotten"
    return (
        f"general text: {words}; the loss on it {'rose' if rose else 'fell'} by {abs(change.value):.4f} ({low:.4f} to "
        f"{high:.4f}) nats per token, where a rise of {forgetting.budget:g} is allowed"
    )


def _describe_training_rows(count: int) -> str:
    """Return how many rows were left out because the run was trained on them."""
    return f"{count} rows are also training rows, and were left out"


# --- answers and tasks -----------------------------------------------------------------------------------------------


def _list_answer_lines(answer: AnswerPair) -> Iterator[ResultLine]:
    yield from ("", ResultHeading(str(answer.prompt[-1]["content"])))
    for who, text in (("reference", answer.reference), ("base", answer.base), ("tuned", answer.tuned)):
        yield f"{who}: {text.strip() or '(empty)'}"


def make_answer_check_table(
    summary: dict[str, BaseAndTunedAnswerMeasure], answers: Sequence[AnswerPair]
) -> ResultTable:
    """Return the means of checks over answers of base and tuned model; repetition and yes-or-no checks in per cent."""
    shares = {"repetition"} | {n for a in answers for n, scores in a.checks.items() if isinstance(scores.tuned, bool)}

    def mean(name: str, value: float) -> str:
        return f"{100 * value:.0f} %" if name in shares else f"{value:.3g}"

    rows = [(name, mean(name, means.base), mean(name, means.tuned)) for name, means in summary.items()]
    return ResultTable((f"mean of {len(answers)} answers", "base", "tuned"), rows)


def describe_win_rate(won: WinRate) -> str:
    """Return how often the tuned model's answer won, and what the judge may have looked at instead."""
    counts = f"{won.wins} wins, {won.ties} ties, {won.losses} losses, {won.unclear} without a clear verdict"
    if won.win_rate is None or won.consistent is None:
        return f"judge: the win rate is not proven: {counts}"
    low, high = won.win_rate.ci95
    longer = "" if won.longer_won is None else f"; the longer answer won {100 * won.longer_won:.0f} % of the decided"
    return (
        f"judge: the tuned model wins {100 * won.win_rate.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of "
        f"{won.prompts} prompts: {counts}. Both orders got the same verdict on {100 * won.consistent:.0f} %; "
        f"answers have {won.base_characters:.0f} (base) and {won.tuned_characters:.0f} (tuned) characters{longer}"
    )


def _make_task_table(tasks: dict[str, dict[str, LmEvalTaskScores]]) -> ResultTable:
    """Return the scores of base and tuned model by task and metric."""

    def score(value: float, error: float | None) -> str:
        return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [
        (task, metric, score(scores.base, scores.base_stderr), score(scores.tuned, scores.tuned_stderr))
        for task, metrics in tasks.items()
        for metric, scores in metrics.items()
    ]
    return ResultTable(("task", "metric", "base", "tuned"), rows)


# --- classes ---------------------------------------------------------------------------------------------------------


def make_class_table(measures: ClassificationMeasures) -> ResultTable:
    """Return rows, precision, recall and F1 of each class."""
    rows = [(c.name, str(c.rows), f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}") for c in measures.classes]
    return ResultTable(("class", "rows", "precision", "recall", "F1"), rows)


def make_confusion_table(measures: ClassificationMeasures) -> ResultTable | None:
    """Return the number of rows by label and prediction; None if a row may have several classes."""
    if measures.confusion is None:
        return None
    names = [c.name for c in measures.classes]
    rows = [(name, *map(str, row)) for name, row in zip(names, measures.confusion, strict=True)]
    return ResultTable(("label ↓ prediction →", *names), rows)


def _make_mistake_table(measures: ClassificationMeasures) -> ResultTable:
    """Return the most frequent pairs of a label and another class that was predicted."""
    names = [c.name for c in measures.classes]
    mistakes = [
        (count, label, predicted)
        for label, row in zip(names, measures.confusion or (), strict=True)
        for predicted, count in zip(names, row, strict=True)
        if count and label != predicted
    ]
    rows = [(label, predicted, str(n)) for n, label, predicted in sorted(mistakes, reverse=True)[:MAX_MISTAKES]]
    return ResultTable(("most frequent mistakes: label", "prediction", "rows"), rows, text_columns=(1,))


def _format_estimate(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _format_share(share: Estimate) -> str:
    value, low, high = (f"{100 * x:.1f} %" for x in (share.value, *share.ci95))
    return f"{value} ({low} to {high})"
