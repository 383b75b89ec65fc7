"""From finished runs to the report: a summary per method, the difference of each pair, the Pareto fronts, which method
to take, and the table in Markdown and for the terminal."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..core.config.objective_registry import load_objective_class
from ..core.foundation.files import parse_json, read_json_object, read_regular_file
from ..core.foundation.formatting import compute_trained_share, format_bytes, format_duration
from ..core.training.run_dir import RunDir
from ..errors import RunError
from ..evaluation.estimate import Estimate
from ..evaluation.eval_result import TextEvalResult, read_eval_result
from ..evaluation.statistics import estimate_mean_difference_and_p_value, holm_correction, mark_pareto_optimal
from .candidates import ComparisonCandidate
from .experiment_results import COSTS, ComparedMethod, CompareResult, Cost, MethodPreferences, PairedDifference
from .markdown_table import format_markdown_table
from .method_advice import SIGNIFICANCE
from .run_grid import ComparisonGrid

COLUMNS = (
    "method", "rate", "trains", "file", "peak memory", "time", "held-out loss", "loss reduction [95 %]", "best for its",
)  # fmt: skip
TERMINAL_COLUMNS = ("method", "rate", "trains", "file", "peak\nmemory", "time", "loss\nreduction", "best for its")
PAIR_COLUMNS = (
    "rate", "trains", "file", "peak memory", "time", "chosen loss", "margin gain [95 %]", "accuracy",
    "accuracy gain [95 %]", "best for its",
)  # fmt: skip
PAIR_TERMINAL_COLUMNS = (
    "rate", "peak\nmemory", "time", "chosen\nloss", "margin\ngain", "accuracy", "accuracy\ngain", "best for its",
)  # fmt: skip
"""Those of preference pairs, after the name. The loss is that of the chosen answers."""
RATE_SOURCES = {"default": "the method's default", "given": "as given", "tuned": "searched on the validation rows"}


@dataclass(frozen=True)
class FinishedCandidateRuns:
    """What the finished runs of one candidate give."""

    compared_method: ComparedMethod
    """The candidate in the report."""
    row_lines: list[int]
    """Line number of each test row."""
    row_tokens: list[int]
    """Supervised tokens of each test row."""
    row_weights: list[int]
    """What the losses of the rows are divided by: those tokens, or 1 for each pair."""
    tuned_row_losses_by_seed: dict[int, list[float]]
    """By seed: nats of each test row; of a pair 1 if the wrong answer is likelier."""
    rows_per_example: int
    """Rows that training learns of each example: 2 for preference pairs."""
    trained_tokens_by_seed: dict[int, list[int]]
    """By seed: trained tokens after each step; equal for equal rows and order."""


def rank_candidates_by_finished_runs(grid: ComparisonGrid) -> list[FinishedCandidateRuns]:
    """Return the finished runs of each candidate that has some, the highest gain first.

    A candidate that lacks a seed is not ranked and comes last: the mean of the runs that did not fail flatters it.

    Raises:
        RunError: runs were measured on different rows, or runs with the same seed trained on different rows.
    """
    done = [(candidate, [s for s in grid.seeds if grid.is_done(candidate, s)]) for candidate in grid.candidates]
    candidates = [_summarize(grid, candidate, seeds) for candidate, seeds in done if seeds]
    for other in candidates[1:]:
        first = candidates[0]
        names = f"{first.compared_method.method} and {other.compared_method.method}"
        if (other.row_lines, other.row_tokens) != (first.row_lines, first.row_tokens):
            raise RunError(f"{names} were measured on different rows", "the same rows")
        if other.rows_per_example != first.rows_per_example:  # both answers, and the chosen ones alone
            continue
        for seed in first.trained_tokens_by_seed.keys() & other.trained_tokens_by_seed.keys():
            if first.trained_tokens_by_seed[seed] != other.trained_tokens_by_seed[seed]:
                message = f"{names} trained on different rows with seed {seed}"
                raise RunError(message, "the same rows in the same order", "start again with another --out")
    methods = add_pareto_optimal_costs([c.compared_method for c in candidates])
    marked = [replace(c, compared_method=method) for c, method in zip(candidates, methods, strict=True)]
    return sorted(marked, key=lambda c: (not c.compared_method.ranked, -c.compared_method.gain.value))


def add_pareto_optimal_costs(methods: Sequence[ComparedMethod]) -> list[ComparedMethod]:
    """Return the methods with the costs for which each is the best, as `list_comparison_notes` explains it.

    A method is the best for no cost if it may not help at all, or if some of its runs failed.
    """
    helpful = [m for m in methods if m.ranked and m.gain.low > 0]
    fronts: dict[str, list[Cost]] = {m.method: [] for m in methods}
    for cost in COSTS:
        on_front = mark_pareto_optimal([(m.get_cost(cost), m.gain.value) for m in helpful])
        for method, is_on_front in zip(helpful, on_front, strict=True):
            fronts[method.method] += [cost] if is_on_front else []
    return [replace(m, front=fronts[m.method]) for m in methods]


def require_test_evaluation(run: RunDir) -> TextEvalResult:
    """Return the evaluation of a run on the test rows; raise RunError if its file is damaged."""
    file = run.evaluation_file("test")
    try:
        result = read_eval_result(read_json_object(file), strict=False)
    except ValueError as e:
        raise RunError(f"{file} is damaged: {e}", "what slimtune eval writes", "delete the file") from None
    assert isinstance(result, TextEvalResult)
    return result


def _summarize(grid: ComparisonGrid, candidate: ComparisonCandidate, seeds: Sequence[int]) -> FinishedCandidateRuns:
    runs = [grid.run_dir(candidate, seed) for seed in seeds]
    results = [read_json_object(run.result_file) for run in runs]
    measured = [require_test_evaluation(run).measures for run in runs]
    rows = [parse_json(read_regular_file(run.scores_file("test"))) for run in runs]
    row_tokens = [r["tokens"] for r in rows[0]]
    reduction, _ = estimate_mean_difference_and_p_value(
        [[r["base"] - r["tuned"] for r in run_rows] for run_rows in rows], row_tokens
    )
    task = (candidate.task or grid.tree.get("task") or {}).get("name", "sft")
    pairs = all("tuned_margin" in r for r in rows[0])
    by_seed = [m.loss_reduction.value for m in measured]

    def mean(name: str) -> float:
        return statistics.fmean(r[name] for r in results)

    first = results[0]
    method = ComparedMethod(
        method=candidate.label,
        of=candidate.method,
        settings=candidate.settings,
        task=candidate.task,
        rate=candidate.learning_rate,
        rate_from=candidate.rate_source,
        seeds=list(seeds),
        ranked=len(seeds) == len(grid.seeds),
        steps=first["steps"],
        trained_tokens=[r["trained_tokens"] for r in results],
        trainable_params=first["trainable_params"],
        total_params=first["total_params"],
        trained_percent=100 * compute_trained_share(candidate.method, first["trainable_params"], first["total_params"]),
        file_bytes=first["adapter_bytes"],
        peak_bytes=mean("peak_bytes"),
        train_seconds=mean("train_seconds"),
        time_seconds=mean("train_cpu_seconds" if first["device"] == "cpu" else "train_seconds"),
        tokens_per_second=mean("tokens_per_second"),
        base_loss=statistics.fmean(m.base_loss.value for m in measured),
        tuned_loss=statistics.fmean(m.tuned_loss.value for m in measured),
        loss_reduction=reduction,
        loss_reduction_by_seed=by_seed,
        loss_reduction_sd_seeds=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        oom_events=sum(r.get("oom_events", 0) for r in results),
        skipped_steps=sum(r.get("skipped_steps", 0) for r in results),
        dtype=first["dtype"],
        device=first["device"],
        preference=_summarize_pairs(rows) if pairs else None,
    )
    tokens_by_step = {}
    for seed, run in zip(seeds, runs, strict=True):
        tokens_by_step[seed] = [m["trained_tokens"] for m in run.load_metrics() if m.get("train_loss") is not None]

    def get_loss(row: Mapping[str, Any]) -> float:
        return float(row["tuned_margin"] <= 0) if pairs else row["tuned"]

    return FinishedCandidateRuns(
        compared_method=method,
        row_lines=[r["line"] for r in rows[0]],
        row_tokens=row_tokens,
        row_weights=[1] * len(row_tokens) if pairs else row_tokens,
        tuned_row_losses_by_seed={
            seed: list(map(get_loss, run_rows)) for seed, run_rows in zip(seeds, rows, strict=True)
        },
        rows_per_example=load_objective_class(task).rows_per_example,
        trained_tokens_by_seed=tokens_by_step,
    )


def _summarize_pairs(rows: Sequence[Sequence[Mapping[str, float]]]) -> MethodPreferences:
    """Return how often and by how much base and tuned model prefer the chosen answers, over seeds and pairs."""
    base, tuned = ([[r[f"{who}_margin"] for r in run_rows] for run_rows in rows] for who in ("base", "tuned"))

    def summarize(measure: Callable[[float], float]) -> tuple[float, float, Estimate]:
        before, after = ([list(map(measure, run)) for run in margins] for margins in (base, tuned))
        gains = [[t - b for b, t in zip(*run, strict=True)] for run in zip(before, after, strict=True)]
        gain, _ = estimate_mean_difference_and_p_value(gains, [1] * len(gains[0]))
        base_mean, tuned_mean = (statistics.fmean(statistics.fmean(run) for run in runs) for runs in (before, after))
        return base_mean, tuned_mean, gain

    base_accuracy, tuned_accuracy, accuracy_gain = summarize(lambda margin: float(margin > 0))
    base_margin, tuned_margin, margin_gain = summarize(float)
    return MethodPreferences(
        base_accuracy=base_accuracy,
        tuned_accuracy=tuned_accuracy,
        accuracy_gain=accuracy_gain,
        base_margin=base_margin,
        tuned_margin=tuned_margin,
        margin_gain=margin_gain,
    )


def compare_gains_of_candidate_pairs(candidates: Sequence[FinishedCandidateRuns]) -> list[PairedDifference]:
    """Return the difference of the gains of each pair of candidates, a's minus b's: above 0, a is better.

    It is paired by seed and row. With one seed it is never beyond noise: the effect of another seed is unknown.
    Candidates that are not ranked are left out.
    """
    found: list[tuple[FinishedCandidateRuns, FinishedCandidateRuns, list[int], Estimate, float]] = []
    for a, b in combinations([c for c in candidates if c.compared_method.ranked], 2):
        seeds = [s for s in a.tuned_row_losses_by_seed if s in b.tuned_row_losses_by_seed]
        if seeds:
            # The base is the same, so the gains differ by b's loss minus a's.
            losses = [zip(a.tuned_row_losses_by_seed[s], b.tuned_row_losses_by_seed[s], strict=True) for s in seeds]
            difference, p = estimate_mean_difference_and_p_value(
                [[lb - la for la, lb in rows] for rows in losses], a.row_weights
            )
            found.append((a, b, seeds, difference, p))
    corrected = holm_correction([p for *_, p in found])
    return [
        PairedDifference(
            a=a.compared_method.method,
            b=b.compared_method.method,
            seeds=seeds,
            difference=difference.value,
            ci95=difference.ci95,
            p=p,
            p_corrected=p_corrected,
            beyond_noise=p_corrected < SIGNIFICANCE and len(seeds) > 1,
        )
        for (a, b, seeds, difference, p), p_corrected in zip(found, corrected, strict=True)
    ]


# --- the table -------------------------------------------------------------------------------------------------------


def make_comparison_row_cells(method: ComparedMethod) -> tuple[str, ...]:
    """Return a method's cells, one for each of `COLUMNS`, of pairs for each of `PAIR_COLUMNS`."""
    if method.preference is None:
        gains = [_format_with_interval(method.loss_reduction)]
    else:
        preference = method.preference
        gains = [
            _format_with_interval(preference.margin_gain),
            f"{preference.tuned_accuracy:.3f}",
            _format_with_interval(preference.accuracy_gain),
        ]
    return (
        method.method,
        f"{method.rate:.2g} {method.rate_from}",
        f"{method.trained_percent:.3g} %",
        format_bytes(method.file_bytes),
        format_bytes(method.peak_bytes),
        format_duration(method.time_seconds),
        f"{method.tuned_loss:.3f}",
        *gains,
        ", ".join(method.front) or ("–" if method.ranked else "not ranked"),
    )


def _format_with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _format_plus_minus(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.high - estimate.value:.{digits}f}"


def make_terminal_row_cells(method: ComparedMethod) -> tuple[str, ...]:
    """Return a method's cells for 80 columns, one for each of `list_comparison_headings(…, terminal=True)`."""
    name, _, trains, file, memory, time, loss, *gains, best_for = make_comparison_row_cells(method)
    rate, gain = f"{method.rate:.2g}", _format_plus_minus(method.gain, 3)
    if method.preference is not None:
        margin = _format_plus_minus(method.preference.margin_gain, 2)
        return name, rate, memory, time, loss, margin, gains[1], gain, best_for
    return name, rate, trains, file, memory, time, gain, best_for


def list_comparison_headings(methods: Sequence[ComparedMethod], *, terminal: bool = False) -> tuple[str, ...]:
    """Return the heads of the cells of `make_comparison_row_cells`, or of `make_terminal_row_cells`."""
    if not methods or methods[0].preference is None:
        return TERMINAL_COLUMNS if terminal else COLUMNS
    first = "task" if all(m.task for m in methods) else "method"
    return (first, *(PAIR_TERMINAL_COLUMNS if terminal else PAIR_COLUMNS))


def describe_comparison_setup(result: CompareResult) -> str:
    """Return what was compared, in one sentence."""
    spent = sorted({n for method in result.methods for n in method.trained_tokens})
    tokens = " to ".join(dict.fromkeys(f"{n:,}" for n in (spent[0], spent[-1]))) if spent else "no"
    seeds = f"{len(result.seeds)} seed{'s' * (len(result.seeds) != 1)}"
    base = "" if result.base_loss is None else f"; the base has {result.base_loss:.3f} nats per token on them"
    where = f" ({result.dtype}, {result.device})" if result.device is not None else ""
    return (
        f"{result.model}{where}: {result.steps} steps, {tokens} trained tokens "
        f"per run, {seeds}; {result.rows} held-out rows, {result.test_tokens:,} supervised tokens{base}."
    )


def list_comparison_notes(result: CompareResult) -> list[str]:
    """Return what a reader of the table must know: what is missing, and what the figures mean."""
    labels = {s: [m.method for m in result.methods if m.rate_from == s] for s in RATE_SOURCES}
    rates = [f"{RATE_SOURCES[source]} ({', '.join(names)})" for source, names in labels.items() if names]
    notes = [f"Learning rates: {'; '.join(rates)}."] if rates else []
    notes += [f"Left out: {entry.method} ({entry.why})." for entry in result.left_out]
    for failure in result.failed:
        what = "search of its learning rate" if failure.seed is None else f"seed {failure.seed}"
        notes.append(f"Failed: {failure.method}, {what} ({failure.why}).")
    seeds = len(result.seeds)
    for method in result.methods:
        if len(method.seeds) < seeds:
            notes.append(f"{method.method} has {len(method.seeds)} of {seeds} seeds, so it is not ranked.")
        if method.skipped_steps:
            notes.append(f"{method.method} skipped {method.skipped_steps} steps: NaN or Inf.")
        if method.oom_events:
            notes.append(f"{method.method} ran out of memory; the step was repeated in smaller micro-batches.")
        if method.method == "full":
            notes.append("full trains an fp32 copy of every weight; its file contains every weight.")
    if result.at_once > 1:
        notes.append(
            f"Peak memory is that of a process in which up to {result.at_once} seeds of a method trained at once."
        )
    if result.on:
        notes.append(f"Runs trained at the same time ({result.on}): the time of each is longer than alone.")
    for label, search in result.searched.items():
        if search.at_the_edge:
            notes.append(f"The rate found for {label} lies at the edge of the searched range.")
    covered = "seeds and rows" if seeds > 1 else "rows only: with one seed, seed noise is not measured"
    preference = result.methods[0].preference if result.methods else None
    what = "Loss reduction: the base's held-out loss minus the tuned model's, nats per token"
    if preference is not None:
        what = (
            "Accuracy: share of the held-out pairs whose chosen answer is the likelier one (the base's is "
            f"{preference.base_accuracy:.3f}); margin: log p(chosen) - log p(rejected), nats per pair; chosen loss: of "
            "the chosen answers"
        )
    notes.append(
        f"{what}, mean over seeds; its 95 % interval covers {covered}. Best for its {', '.join(COSTS)}: no other "
        f"{'gains more' if preference else 'method reduces the loss more'} for as little of it, and it surely "
        f"{'gains' if preference else 'reduces it'}. Time: of the training steps, "
        f"{'CPU time' if result.device == 'cpu' else 'by the clock'}."
    )
    return notes


def format_comparison_markdown(result: CompareResult) -> str:
    """Return `table.md`."""
    columns = list_comparison_headings(result.methods)
    table = format_markdown_table(
        columns, map(make_comparison_row_cells, result.methods), left_aligned_columns=(0, len(columns) - 1)
    )
    parts = [describe_comparison_setup(result), table, *list_comparison_notes(result), result.advice]
    return "\n\n".join(parts) + "\n"
