"""From finished runs to the report: a summary per method, the difference of each pair, the Pareto fronts, one sentence
of advice, and the table in Markdown and for the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..core.config.objective_registry import objective_class
from ..core.foundation.files import parse_json, read_json, read_regular_file
from ..core.foundation.formatting import format_bytes, format_duration, format_markdown_table
from ..core.training.run_dir import RENAMED_KEYS
from ..errors import RunError
from ..evaluation.statistics import estimate_over_seeds, holm_correction, make_fields, mark_pareto_optimal
from .candidates import Candidate
from .run_grid import Grid

COST_FIELDS = {"memory": "peak_bytes", "size": "file_bytes", "time": "time_seconds"}
"""The costs that the loss reduction is weighed against, and the field of each."""
SIGNIFICANCE = 0.05
"""A difference with a corrected p-value below this is beyond noise."""
TOLERANCE = 0.1
"""Costs within this share of the least count as equal (peaks and times vary by themselves), and so does a loss
reduction that is surely at most this share below the best."""
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
MEASURES = {"loss_reduction": ("loss reduction", "nats per token"), "accuracy_gain": ("accuracy gain", "of the pairs")}
"""What ranks candidates, by its field: its name and its unit. Of preference pairs it is the accuracy."""
RATE_SOURCES = {"default": "the method's default", "given": "as given", "tuned": "searched on the validation rows"}


@dataclass
class Summary:
    """What the finished runs of one candidate give."""

    fields: dict[str, Any]  # what `--json` prints of it; means are over its seeds
    row_lines: list[int]  # line number of each test row
    row_tokens: list[int]  # supervised tokens of each test row
    row_weights: list[int]  # what the losses of the rows are divided by: those tokens, or 1 for each pair
    tuned_losses: dict[int, list[float]]  # by seed: nats of each test row; of a pair 1 if the wrong answer is likelier
    rows_per_example: int  # that training learns of each example: 2 for preference pairs
    tokens_by_step: dict[int, list[int]]  # by seed: trained tokens after each step; equal for equal rows and order


def summarize_candidates(grid: Grid) -> list[Summary]:
    """Return a summary of each candidate with a finished run, the highest loss reduction first.

    A candidate that lacks a seed is not ranked and comes last: the mean of the runs that did not fail flatters it.

    Raises:
        RunError: runs were measured on different rows, or runs with the same seed trained on different rows.
    """
    done = [(candidate, [s for s in grid.seeds if grid.is_done(candidate, s)]) for candidate in grid.candidates]
    summaries = [_summarize(grid, candidate, seeds) for candidate, seeds in done if seeds]
    for other in summaries[1:]:
        first = summaries[0]
        names = f"{first.fields['method']} and {other.fields['method']}"
        if (other.row_lines, other.row_tokens) != (first.row_lines, first.row_tokens):
            raise RunError(f"{names} were measured on different rows", "the same rows")
        if other.rows_per_example != first.rows_per_example:  # both answers, and the chosen ones alone
            continue
        for seed in first.tokens_by_step.keys() & other.tokens_by_step.keys():
            if first.tokens_by_step[seed] != other.tokens_by_step[seed]:
                message = f"{names} trained on different rows with seed {seed}"
                raise RunError(message, "the same rows in the same order", "start again with another --out")
    mark_fronts([s.fields for s in summaries])
    return sorted(summaries, key=lambda s: (not s.fields["ranked"], -get_gain(s.fields)))


def get_measure(method: Mapping[str, Any]) -> str:
    """Return the field that ranks a method."""
    return "accuracy_gain" if "accuracy_gain" in method else "loss_reduction"


def get_gain(method: Mapping[str, Any]) -> float:
    """Return how much better than the base a method is, by what ranks it."""
    return method[get_measure(method)]


def get_interval(method: Mapping[str, Any]) -> list[float]:
    """Return the 95 % interval of `get_gain`."""
    return method[f"{get_measure(method)}_ci95"]


def mark_fronts(methods: Sequence[Mapping[str, Any]]) -> None:
    """Append to the `front` of each method the costs for which it is the best, as `list_notes` explains it.

    A method is the best for no cost if it may not help at all, or if some of its runs failed.
    """
    helpful = [m for m in methods if m["ranked"] and get_interval(m)[0] > 0]
    for cost, name in COST_FIELDS.items():
        on_front = mark_pareto_optimal([(m[name], get_gain(m)) for m in helpful])
        for method, is_on_front in zip(helpful, on_front, strict=True):
            method["front"].extend([cost] if is_on_front else [])


def _summarize(grid: Grid, candidate: Candidate, seeds: Sequence[int]) -> Summary:
    runs = [grid.run_dir(candidate, seed) for seed in seeds]
    results = [read_json(run.result_file, RENAMED_KEYS) for run in runs]
    measured = [read_json(run.evaluation_file("test"), RENAMED_KEYS) for run in runs]
    rows = [parse_json(read_regular_file(run.scores_file("test"))) for run in runs]
    row_tokens = [r["tokens"] for r in rows[0]]
    reduction, _ = estimate_over_seeds([[r["base"] - r["tuned"] for r in run_rows] for run_rows in rows], row_tokens)
    task = (candidate.task or grid.tree.get("task") or {}).get("name", "sft")
    pairs = all("tuned_margin" in r for r in rows[0])
    by_seed = [m["loss_reduction"] for m in measured]

    def mean(name: str) -> float:
        return statistics.fmean(r[name] for r in results)

    first = results[0]
    fields = {
        "method": candidate.label,
        "of": candidate.method,
        "settings": candidate.settings,
        "task": candidate.task,
        "rate": candidate.learning_rate,
        "rate_from": candidate.rate_source,
        "seeds": list(seeds),
        "ranked": len(seeds) == len(grid.seeds),
        "steps": first["steps"],
        "trained_tokens": [r["trained_tokens"] for r in results],
        "trainable_params": first["trainable_params"],
        "total_params": first["total_params"],
        "trained_percent": 100 * first["trainable_params"] / first["total_params"],
        "file_bytes": first["adapter_bytes"],
        "peak_bytes": mean("peak_bytes"),
        "train_seconds": mean("train_seconds"),
        # On a CPU the processor time depends less on other work on the machine than the clock does.
        "time_seconds": mean("train_cpu_seconds" if first["device"] == "cpu" else "train_seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "base_loss": statistics.fmean(m["base_loss"] for m in measured),
        "tuned_loss": statistics.fmean(m["tuned_loss"] for m in measured),
        **make_fields(loss_reduction=reduction),
        "loss_reduction_by_seed": by_seed,
        "loss_reduction_sd_seeds": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        "oom_events": sum(r.get("oom_events", 0) for r in results),
        "skipped_steps": sum(r.get("skipped_steps", 0) for r in results),
        "dtype": first["dtype"],
        "device": first["device"],
        "front": [],
    }
    tokens_by_step = {}
    for seed, run in zip(seeds, runs, strict=True):
        tokens_by_step[seed] = [m["trained_tokens"] for m in run.load_metrics() if m.get("train_loss") is not None]
    if pairs:
        fields |= _summarize_pairs(rows)

    def get_loss(row: Mapping[str, Any]) -> float:
        return float(row["tuned_margin"] <= 0) if pairs else row["tuned"]

    return Summary(
        fields,
        [r["line"] for r in rows[0]],
        row_tokens,
        [1] * len(row_tokens) if pairs else row_tokens,
        {seed: list(map(get_loss, run_rows)) for seed, run_rows in zip(seeds, rows, strict=True)},
        objective_class(task).rows_per_example,
        tokens_by_step,
    )


def _summarize_pairs(rows: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return how often and by how much base and tuned model prefer the chosen answers, over seeds and pairs."""
    base, tuned = ([[r[f"{who}_margin"] for r in run_rows] for run_rows in rows] for who in ("base", "tuned"))
    result: dict[str, Any] = {}
    for name, measure in (("accuracy", lambda margin: float(margin > 0)), ("margin", float)):
        before, after = ([list(map(measure, run)) for run in margins] for margins in (base, tuned))
        gains = [[t - b for b, t in zip(*run, strict=True)] for run in zip(before, after, strict=True)]
        gain, _ = estimate_over_seeds(gains, [1] * len(gains[0]))
        for who, runs in (("base", before), ("tuned", after)):
            result[f"{who}_{name}"] = statistics.fmean(statistics.fmean(run) for run in runs)
        result |= make_fields(**{f"{name}_gain": gain})
    return result


def compare_pairs(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return the difference of the gains of each pair of candidates, a's minus b's: above 0, a is better.

    It is paired by seed and row. With one seed it is never beyond noise: the effect of another seed is unknown.
    Candidates that are not ranked are left out.
    """
    pairs: list[dict[str, Any]] = []
    for a, b in combinations([s for s in summaries if s.fields["ranked"]], 2):
        seeds = [s for s in a.tuned_losses if s in b.tuned_losses]
        if seeds:
            # The base is the same, so the gains differ by b's loss minus a's.
            losses = [zip(a.tuned_losses[s], b.tuned_losses[s], strict=True) for s in seeds]
            difference, p = estimate_over_seeds([[lb - la for la, lb in rows] for rows in losses], a.row_weights)
            pairs.append({
                "a": a.fields["method"], "b": b.fields["method"], "seeds": seeds, "difference": difference.value,
                "ci95": difference.interval, "p": p,
            })  # fmt: skip
    for pair, p in zip(pairs, holm_correction([pair["p"] for pair in pairs]), strict=True):
        pair |= {"p_corrected": p, "beyond_noise": p < SIGNIFICANCE and len(pair["seeds"]) > 1}
    return pairs


def recommend_method(methods: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return one sentence: which method to take, which do not differ from the best beyond noise, which are worse.

    The advice is the best method or a cheaper one that is as good. A method is as good if the whole interval of its
    difference stays within a tenth of the best loss reduction; a wide interval around zero proves nothing. Cheaper
    means cheapest in most of memory, size and time, where costs within a tenth count as equal.
    """
    unranked = [m for m in methods if not m.get("ranked", True)]
    methods = [m for m in methods if m not in unranked]
    not_ranked = f" Not ranked, because a run failed: {_join_names(unranked)}." if unranked else ""
    if not methods:
        return f"No method has finished its runs, so there is nothing to advise.{not_ranked}"
    best, others = methods[0], methods[1:]
    measure, unit = MEASURES[get_measure(best)]
    if get_interval(best)[0] <= 0:
        reason = f"the {measure} of the best, {best['method']}, is not beyond noise ({_format_gain(best)})"
        return f"Take none of them: {reason}.{not_ranked}"
    if not others:
        return f"Only {best['method']} was measured: {measure} {_format_gain(best)}.{not_ranked}"
    if len(best["seeds"]) < 2:
        gaps = [f"{m['method']} is behind by {get_gain(best) - get_gain(m):.3f}" for m in others]
        reason = "with one seed, the effect of another seed is unknown (--seeds 3 measures it)"
        highest = f"with this one {best['method']} has the highest {measure} ({_format_gain(best)})"
        return f"No method is proven to be the best: {reason}; {highest}; {'; '.join(gaps)}.{not_ranked}"
    with_best = {p["b"]: p for p in pairs if p["a"] == best["method"]}
    largest_gap = {name: pair["ci95"][1] for name, pair in with_best.items()}
    as_good = [m for m in others if largest_gap.get(m["method"], math.inf) <= TOLERANCE * get_gain(best)]
    worse = [m for m in others if m not in as_good and with_best.get(m["method"], {}).get("beyond_noise")]
    undecided = [m for m in others if m not in as_good and m not in worse]

    choices = [best, *as_good]
    cheapest = {cost: min(choices, key=lambda m: m[name]) for cost, name in COST_FIELDS.items()}

    def low_costs(method: Mapping[str, Any]) -> list[str]:
        return [cost for cost, name in COST_FIELDS.items() if method[name] <= (1 + TOLERANCE) * cheapest[cost][name]]

    choice = max(choices, key=lambda m: (len(low_costs(m)), get_gain(m)))
    size, duration = format_bytes(choice["file_bytes"]), format_duration(choice["time_seconds"])
    costs = f"{format_bytes(choice['peak_bytes'])}, a file of {size}, {duration} per run"
    parts = [f"Take {choice['method']} ({measure} {_format_gain(choice)}; {costs})"]
    if as_good:
        parts.append(f"{_join_names(choices)} are as good as one another, within a tenth of the {measure}")
        dear = [cost for cost in COST_FIELDS if cost not in low_costs(choice)]
        parts += [f"of these {cheapest[cost]['method']} takes the least {cost}" for cost in dear]
    if undecided:
        verb = "does" if len(undecided) == 1 else "do"
        text = f"{_join_names(undecided)} {verb} not differ from {best['method']} beyond noise"
        gaps = [largest_gap[m["method"]] for m in undecided if m["method"] in largest_gap]
        if gaps:
            text += f", but may be up to {max(gaps):.3f} worse: more seeds or test rows would tell"
        parts.append(text)
    if worse:
        distances = sorted(get_gain(best) - get_gain(m) for m in worse)
        span = " to ".join(dict.fromkeys(f"{gap:.3f}" for gap in (distances[0], distances[-1])))
        verb = "is" if len(worse) == 1 else "are"
        parts.append(f"{_join_names(worse)} {verb} worse than {best['method']} by {span} {unit}")
    return "; ".join(parts) + f".{not_ranked}"


def _format_gain(method: Mapping[str, Any]) -> str:
    low, high = get_interval(method)
    return f"{get_gain(method):.3f} {MEASURES[get_measure(method)][1]}, {low:.3f} to {high:.3f}"


def _join_names(methods: Sequence[Mapping[str, Any]]) -> str:
    names = [m["method"] for m in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the table -------------------------------------------------------------------------------------------------------


def format_row(method: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a method's cells, one for each of `COLUMNS`, of pairs for each of `PAIR_COLUMNS`."""
    names = ("margin_gain", "accuracy_gain") if get_measure(method) == "accuracy_gain" else ("loss_reduction",)
    gains = ["{:.3f} [{:.3f}, {:.3f}]".format(method[name], *method[f"{name}_ci95"]) for name in names]
    if len(gains) > 1:
        gains.insert(1, f"{method['tuned_accuracy']:.3f}")
    return (
        method["method"],
        f"{method['rate']:.2g} {method['rate_from']}",
        f"{method['trained_percent']:.3g} %",
        format_bytes(method["file_bytes"]),
        format_bytes(method["peak_bytes"]),
        format_duration(method["time_seconds"]),
        f"{method['tuned_loss']:.3f}",
        *gains,
        ", ".join(method["front"]) or ("–" if method.get("ranked", True) else "not ranked"),
    )


def format_terminal_row(method: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a method's cells for a terminal of 80 columns, one for each of `list_columns(…, terminal=True)`."""
    name, _, trains, file, memory, time, loss, *gains, best_for = format_row(method)
    gain = f"{get_gain(method):.3f} ± {get_interval(method)[1] - get_gain(method):.3f}"
    if len(gains) > 1:
        margin = f"{method['margin_gain']:.2f} ± {method['margin_gain_ci95'][1] - method['margin_gain']:.2f}"
        return name, f"{method['rate']:.2g}", memory, time, loss, margin, gains[1], gain, best_for
    return name, f"{method['rate']:.2g}", trains, file, memory, time, gain, best_for


def list_columns(methods: Sequence[Mapping[str, Any]], *, terminal: bool = False) -> tuple[str, ...]:
    """Return the heads of the cells of `format_row`, or of `format_terminal_row`."""
    if not methods or get_measure(methods[0]) == "loss_reduction":
        return TERMINAL_COLUMNS if terminal else COLUMNS
    first = "task" if all(m.get("task") for m in methods) else "method"
    return (first, *(PAIR_TERMINAL_COLUMNS if terminal else PAIR_COLUMNS))


def describe_comparison_setup(result: Mapping[str, Any]) -> str:
    """Return what was compared, in one sentence."""
    spent = sorted({n for method in result["methods"] for n in method["trained_tokens"]})
    tokens = " to ".join(dict.fromkeys(f"{n:,}" for n in (spent[0], spent[-1]))) if spent else "no"
    seeds = f"{len(result['seeds'])} seed{'s' * (len(result['seeds']) != 1)}"
    base = "" if result["base_loss"] is None else f"; the base has {result['base_loss']:.3f} nats per token on them"
    where = f" ({result['dtype']}, {result['device']})" if result["device"] is not None else ""
    return (
        f"{result['model']}{where}: {result['steps']} steps, {tokens} trained tokens "
        f"per run, {seeds}; {result['rows']} held-out rows, {result['test_tokens']:,} supervised tokens{base}."
    )


def list_notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know: what is missing, and what the figures mean."""
    labels = {s: [m["method"] for m in result["methods"] if m["rate_from"] == s] for s in RATE_SOURCES}
    rates = [f"{RATE_SOURCES[source]} ({', '.join(names)})" for source, names in labels.items() if names]
    notes = [f"Learning rates: {'; '.join(rates)}."] if rates else []
    notes += [f"Left out: {entry['method']} ({entry['why']})." for entry in result["left_out"]]
    for failure in result["failed"]:
        what = "search of its learning rate" if failure["seed"] is None else f"seed {failure['seed']}"
        notes.append(f"Failed: {failure['method']}, {what} ({failure['why']}).")
    seeds = len(result["seeds"])
    for method in result["methods"]:
        if len(method["seeds"]) < seeds:
            notes.append(f"{method['method']} has {len(method['seeds'])} of {seeds} seeds, so it is not ranked.")
        if method.get("skipped_steps"):
            notes.append(f"{method['method']} skipped {method['skipped_steps']} steps: NaN or Inf.")
        if method["oom_events"]:
            notes.append(f"{method['method']} ran out of memory; the step was repeated in smaller micro-batches.")
        if method["method"] == "full":
            notes.append("full trains an fp32 copy of every weight; its file contains every weight.")
    if (at_once := result.get("at_once", 1)) > 1:
        notes.append(f"Peak memory is that of a process in which up to {at_once} seeds of a method trained at once.")
    if place := result.get("on"):
        notes.append(f"Runs trained at the same time ({place}): the time of each is longer than alone.")
    for label, search in result["searched"].items():
        if search["at_the_edge"]:
            notes.append(f"The rate found for {label} lies at the edge of the searched range.")
    covered = "seeds and rows" if seeds > 1 else "rows only: with one seed, seed noise is not measured"
    pairs = bool(result["methods"]) and get_measure(result["methods"][0]) == "accuracy_gain"
    what = "Loss reduction: the base's held-out loss minus the tuned model's, nats per token"
    if pairs:
        base = result["methods"][0]["base_accuracy"]
        what = (
            "Accuracy: share of the held-out pairs whose chosen answer is the likelier one (the base's is "
            f"{base:.3f}); margin: log p(chosen) - log p(rejected), nats per pair; chosen loss: of the chosen answers"
        )
    notes.append(
        f"{what}, mean over seeds; its 95 % interval covers {covered}. Best for its {', '.join(COST_FIELDS)}: no other "
        f"{'gains more' if pairs else 'method reduces the loss more'} for as little of it, and it surely "
        f"{'gains' if pairs else 'reduces it'}. Time: of the training steps, "
        f"{'CPU time' if result['device'] == 'cpu' else 'by the clock'}."
    )
    return notes


def format_markdown(result: Mapping[str, Any]) -> str:
    """Return `table.md`."""
    columns = list_columns(result["methods"])
    table = format_markdown_table(columns, map(format_row, result["methods"]), left=(0, len(columns) - 1))
    parts = [describe_comparison_setup(result), table, *list_notes(result), result["advice"]]
    return "\n\n".join(parts) + "\n"
