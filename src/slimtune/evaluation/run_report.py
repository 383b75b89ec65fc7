"""report.html: one run on one page, made only from the files in its folder, so it can be written again at any time.

The page is one HTML file without network, scripts or fonts. The template escapes every text of the run, and a path is
shown relative to the working directory or by its name alone.
"""

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..core.config import Recipe
from ..core.foundation.files import write_atomic
from ..core.foundation.formatting import format_bytes, format_count, format_duration
from ..core.foundation.version import __version__
from ..core.training.forgetting_budget import get_forgetting_budget
from ..core.training.held_out_rows import MIN_EVAL_ROWS, find_test_or_validation_split
from ..core.training.run_dir import RunDir
from ..objectives.policy_objective import PolicyObjective
from .charts import (
    ChartEstimate,
    ChartLine,
    is_finite_number,
    make_jinja_environment,
    render_interval_chart,
    render_length_histogram,
    render_line_chart,
    render_stacked_bar,
)
from .estimate import Estimate
from .eval_result import (
    BaselineComparisonMeasures,
    ClassificationMeasures,
    EvalMeasures,
    ForgettingMeasures,
    KTOMeasures,
    LossMeasures,
    PolicyMeasures,
    RewardModelMeasures,
    SFTMeasures,
)
from .output_files import resolve_page_file
from .result_lines import (
    ResultTable,
    describe_win_rate,
    list_context_lines,
    make_answer_check_table,
    make_class_table,
    make_confusion_table,
)
from .run_results import RunResults, find_held_out_evaluation, load_run_results, parse_evaluations_of_run


def write_run_report_and_list_damage(run: RunDir, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of a run to `out` or `report.html` in its folder, replacing an earlier one.

    Returns its path and what is damaged in the run's files, one sentence each.
    """
    file = run.report_file if out is None else resolve_page_file(out)
    damage: list[str] = []
    write_atomic(file, render_run_report_html(run, damage))
    return file, damage


def render_run_report_html(run: RunDir, damage_messages: list[str] | None = None) -> str:
    """Return the page of a run as HTML; `damage_messages` gets a sentence for each damaged file or part.

    Where a file is missing, the page names the command that creates it.
    """
    errors = [] if damage_messages is None else damage_messages
    r = load_run_results(run, raise_if_damaged=False)
    assert r.recipe is not None
    errors += [e.replace(f"{run.path}{os.sep}", "") for e in r.errors]
    evaluations = parse_evaluations_of_run(r, errors)
    recipe, folder = r.recipe, _display_path(run.path)
    eval_options = ["--data", "HELD_OUT.jsonl"]
    held_out = r.result.get("held_out_rows")
    if not isinstance(held_out, int) or held_out >= MIN_EVAL_ROWS:
        eval_options = {"test": [], "validation": ["--split", "validation"], None: eval_options}[
            find_test_or_validation_split(recipe.data)
        ]
    settings = recipe.method.settings.items()
    recipe_text = re.sub(  # with absolute paths shortened
        r"(?m)^((?:[ -]*|[ \w-]*[\w]: )['\"]?)(/[^\n]*?)(['\"]?)$",
        lambda found: found[1] + _display_path(found[2]) + found[3],
        recipe.to_yaml(),
    )
    return _render_page(
        name=run.path.resolve().name,
        folder=folder,
        recipe_file=f"{folder}/{run.recipe_file.name}",
        eval_options=eval_options,
        model=_display_path(recipe.model.name),
        method_settings=", ".join(f"{k} {v}" for k, v in settings if v not in (None, {}, [], False)),
        task=re.sub(
            r"(?<![\w:/.])/[^\s'\",\]]+",  # absolute paths, and not those in addresses
            lambda found: _display_path(found[0]),
            ", ".join([recipe.task.name, *(f"{k} {v}" for k, v in recipe.task.settings.items() if v is not None)]),
        ),
        recipe=recipe,
        writes_text=recipe.objective().task_type == "CAUSAL_LM",
        samples_answers=isinstance(recipe.objective(), PolicyObjective),
        recipe_text=recipe_text,
        results=r,
        errors=errors,
        evaluations=evaluations,
        held_out=find_held_out_evaluation(r, evaluations),
        shares_prefix=recipe.train.packing is not False and recipe.train.share_prefix,
        memory_charts=render_memory_charts,
        plan_rows=_plan_rows,
        training_charts=render_training_charts,
    )


def render_data_report_page(report_json: Mapping[str, Any]) -> str:
    """Return what `slimtune data --json` prints as a page of its own."""
    return _render_page(name=_display_path(report_json["file"]), report=report_json, shares_prefix=True)


def _render_page(errors: list[str] | None = None, **values: Any) -> str:
    errors = [] if errors is None else errors

    def guard(source: str, caller: Callable[[], Markup]) -> Markup:
        """Return a part of the page, or a note if the values in `source` are of other kinds than slimtune writes."""
        try:
            return caller()
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, jinja2.TemplateError) as e:
            damage = f"{source} is damaged: its values are not of the kind that slimtune writes"
            errors.append(f"{damage} ({e})")
            return Markup('<p class="missing">not shown: {}</p>').format(damage)

    style = Markup(files(__package__).joinpath("report.css").read_text(encoding="utf-8"))
    page = make_jinja_environment().get_template("report.html.j2")
    return page.render(
        **values, errors=errors, guard=guard, style=style, version=__version__, **make_report_template_functions()
    )


def make_report_template_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that the templates call, by their names there."""
    return {
        "fixed": fixed,
        "signed": signed,
        "percent": percent,
        "whole": whole,
        "figure": figure,
        "bytes": size,
        "count": count,
        "duration": duration,
        "interval_text": _format_ends,
        "display_path": _display_path,
        "command": lambda *words: shlex.join(["slimtune", *words]),
        "quote": shlex.quote,
        "length_histogram": _length_histogram,
        "forgetting_chart": _forgetting_chart,
        "measure_charts": _draw_measures,
        "context_lines": list_context_lines,
        "class_table": _find_class_table,
        "confusion_table": _find_confusion_table,
        "check_table": make_answer_check_table,
        "win_rate_text": describe_win_rate,
        "rows_name": lambda split: (
            f"{split} rows" if split in ("test", "validation") else f"rows of the file {split[5:]}"
        ),
        "check_value": _check_value,
    }


# --- values as text --------------------------------------------------------------------------------------------------


def _of_number(to_text: Callable[..., str]) -> Callable[..., str]:
    """Return the function that gives a dash for everything but finite numbers."""
    return lambda value, *options: to_text(value, *options) if is_finite_number(value) else "–"


fixed = _of_number(lambda x, digits=3: f"{x:.{digits}f}".replace("-", "−"))
signed = _of_number(lambda x, digits=3: f"{x:+.{digits}f}".replace("-", "−"))
percent = _of_number(lambda x, digits=1: f"{100 * x:.{digits}f} %")
whole = _of_number(lambda x: f"{round(x):,}")
figure = _of_number(lambda x: f"{x:.4g}")
size = _of_number(format_bytes)
count = _of_number(format_count)
duration = _of_number(format_duration)


def _range(low: Any, high: Any, to_text: Callable[[Any], str]) -> str:
    return " to ".join(dict.fromkeys((to_text(low), to_text(high))))


def _format_ends(estimate: Estimate, digits: int) -> str:
    """Return the interval of an estimate as text."""
    return _range(estimate.low, estimate.high, lambda x: fixed(x, digits))


def _display_path(path: str | Path) -> str:
    """Return a path relative to the working directory, or only its name where it is outside."""
    if not Path(path).is_absolute():
        return str(path)
    place, here = Path(os.path.abspath(path)), Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name


# --- plan, data, training, evaluation --------------------------------------------------------------------------------


def _peaks(r: RunResults) -> tuple[Any, Any, Any]:
    """Return the lowest and highest planned peak and the measured one: of the process, on a GPU of its tensors."""
    need = r.plan.get("need_bytes") or {}
    if str(r.result.get("device", "")).startswith("cuda"):
        need = dict.fromkeys(("low", "high"), r.plan.get("allocated_bytes"))
    return need.get("low"), need.get("high"), r.result.get("peak_bytes")


def render_memory_charts(run_results: RunResults) -> list[Markup]:
    """Return charts of the planned memory, with what a run measured, if it did."""
    low, high, peak = _peaks(run_results)
    parts = run_results.plan.get("parts") or {}
    bars = [render_stacked_bar("Memory of a step, by part", parts, predicted_range=(low, high), measured=peak)]
    usable = (run_results.plan.get("usable_bytes") or {}).get("low")
    if is_finite_number(usable) and usable and is_finite_number(high):
        title = f"Share of the memory of {run_results.plan.get('card', 'the machine')}"
        note = f"at most {percent(high / usable)} of {format_bytes(usable)} is planned"
        bars.append(render_stacked_bar(title, {"need": high}, note=note, measured=peak, capacity=usable))
    return [bar for bar in bars if bar]


def _plan_rows(r: RunResults) -> list[tuple[str, str, str, bool | None]]:
    """Return what was planned and measured: name, planned, measured, and whether they agree (None: unknown)."""

    def agrees(value: Any, low: Any, high: Any) -> bool | None:
        return low <= value <= high if all(map(is_finite_number, (value, low, high))) else None

    plan, result, probe, (low, high, peak) = r.plan, r.result, r.probe, _peaks(r)
    rows = [("peak memory", _range(low, high, size), size(peak), agrees(peak, low, high) if low != high else None)]
    if probe:
        name = f"longest micro-batch, {whole(probe.get('tokens'))} tokens"
        planned = _range(probe.get("low"), probe.get("high"), size)
        rows.append((name, planned, size(probe.get("bytes")), probe.get("as_planned")))
    rows.append(
        ("parameters trained", whole(plan.get("trainable_params")), whole(result.get("trainable_params")), None)
    )
    rows.append(("adapter file", size(plan.get("adapter_bytes")), size(result.get("adapter_bytes")), None))
    speed: Any = plan.get("tokens_per_second") or {}
    slow, fast = speed.get("low"), speed.get("high")
    tokens, measured = result.get("trained_tokens"), result.get("tokens_per_second")
    planned = _range(slow, fast, whole) if speed else "unknown"
    rows.append(("tokens/s", planned, whole(measured), agrees(measured, slow, fast)))
    known = all(is_finite_number(x) and x > 0 for x in (slow, fast)) and is_finite_number(tokens)
    planned = _range(tokens / fast, tokens / slow, format_duration) if known else "unknown"
    rows.append(("time of the training steps", planned, duration(result.get("train_seconds")), None))
    return rows


def _length_histogram(report: Mapping[str, Any]) -> Markup:
    lengths = report.get("lengths") or {}
    quantiles = {"median": "median", "90 % up to": "p90", "longest": "max"}
    note = "tokens: " + ", ".join(f"{name} {whole(lengths.get(key))}" for name, key in quantiles.items())
    return render_length_histogram(lengths.get("histogram") or [], report.get("max_seq_len"), note)


def render_training_charts(results: RunResults, recipe: Recipe) -> list[Markup]:
    """Return charts of the losses, which may be empty, and of what else was logged."""

    def series(name: str, key: str, color: str = "one", unit: float = 1.0, **style: bool) -> ChartLine:
        points = [(m["step"], m[key] / unit) for m in results.metrics if "step" in m and is_finite_number(m.get(key))]
        return ChartLine(name, color, points, **style)

    training, validation = series("training", "train_loss", smooth=True), series("validation", "validation_loss", "two")
    validation = dataclasses.replace(validation, markers=True)
    # The base's loss on the same validation rows is where the curve of the validation begins.
    measured = next((e.result.measures for e in parse_evaluations_of_run(results) if e.name == "validation"), None)
    start = measured.base_loss.value if isinstance(measured, LossMeasures) else None
    if validation.points and is_finite_number(start) and recipe.task.name == "sft":
        validation = dataclasses.replace(validation, points=[(0, start), *validation.points])
        mark: tuple[Any, str] = (start, f"untrained base {fixed(start)}")
    else:  # the loss of step 1 is computed before the first update
        first = next((loss for step, loss in training.points if step == 1), None)
        mark = (first, f"before training {fixed(first)}")
    others = [
        ("Speed", "trained tokens/s", "tokens_per_second", 1.0),
        ("Memory", "GiB in use", "memory_bytes", 2.0**30),
        ("Learning rate", recipe.train.lr_scheduler.replace("_", " "), "learning_rate", 1.0),
        ("Gradient norm", "before clipping", "grad_norm", 1.0),
        ("Reward", "mean of a step's sampled answers", "reward", 1.0),
        ("No signal", "share of a step's prompts whose answers have one reward", "frac_reward_zero_std", 1.0),
        ("Answer length", "mean tokens", "completions/mean_length", 1.0),
        ("Distance", "KL from the base, nats per token", "kl", 1.0),
        ("Entropy", "nats per token", "entropy", 1.0),
    ]
    lines = [
        render_line_chart(title, what, [series(title.lower(), key, unit=unit)]) for title, what, key, unit in others
    ]
    curve = series("forgetting", "forgetting", "two", markers=True)
    if curve.points and (budget := get_forgetting_budget(recipe)) is not None:
        curve = dataclasses.replace(curve, points=[(0, 0.0), *curve.points])
        unit = "nats per token of general text; above 0 is forgetting"
        lines.append(
            render_line_chart("Forgetting", unit, [curve], reference_value_and_label=(budget, f"budget {budget:g}"))
        )
    unit = "nats per supervised token" if recipe.task.name == "sft" else f"of {recipe.task.name}"
    losses = render_line_chart("Loss", unit, [training, validation], tall=True, reference_value_and_label=mark)
    return [losses, *filter(None, lines)]


def _draw_measures(measures: EvalMeasures) -> list[tuple[str, str, Markup, Markup]]:
    """Return title, unit, chart of base and tuned model, and chart of the change, for each measure."""
    if isinstance(measures, BaselineComparisonMeasures):  # a head on rows, which the base does not have
        return _draw_head_measures(measures)
    found: list[tuple[str, str, Markup, Markup]] = []

    def draw(
        title: str, unit: str, base: Estimate | None, tuned: Estimate | None, change: Estimate | None, digits: int,
        factor: float = 1,
    ) -> None:  # fmt: skip
        if base is None or tuned is None:
            return
        both = [_make_chart_estimate(*model, fixed, digits, factor) for model in (("base", base), ("tuned", tuned))]
        changes = [] if change is None else [_make_chart_estimate("change", change, signed, digits, factor)]
        found.append((title, unit, render_interval_chart(both), render_interval_chart(changes, [(0.0, "")])))

    if isinstance(measures, PolicyMeasures):
        r = measures
        draw("Reward", "mean of sampled answers", r.base_reward, r.tuned_reward, r.reward_gain, 3)
        best = f"highest of {r.answers} answers"
        draw("Best reward", best, r.base_best_reward, r.tuned_best_reward, r.best_reward_gain, 3)
        return found
    assert isinstance(measures, LossMeasures)
    m = measures
    if isinstance(m, SFTMeasures) and (p := m.preference) is not None:
        share = "% of pairs whose chosen answer is likelier"
        draw("Preference", share, p.base_accuracy, p.tuned_accuracy, p.accuracy_gain, 1, 100)
        draw("Preference margin", "nats per pair, higher is better", p.base_margin, p.tuned_margin, p.margin_gain, 2)
    if isinstance(m, KTOMeasures):
        u, auc = m.unpaired_preference, "AUC of log p, 0.5 is chance"
        draw("Good answers likelier", auc, u.base_auc, u.tuned_auc, u.auc_gain, 3)
        per_token = "AUC of log p per token"
        draw("The same per token", per_token, u.base_token_auc, u.tuned_token_auc, u.token_auc_gain, 3)
    draw("Loss", "nats per token, lower is better", m.base_loss, m.tuned_loss, -m.loss_reduction, 3)
    draw("Perplexity", "lower is better", m.base_perplexity, m.tuned_perplexity, None, 2)
    hits = "% of tokens predicted, higher is better"
    draw("Accuracy", hits, m.base_accuracy, m.tuned_accuracy, m.accuracy_gain, 1, 100)
    if (d := m.prompt_dependence) is not None:
        draw("Prompt dependence", "nats per token lost with another row's prompt", d.base, d.tuned, d.change, 3)
    return found


def _draw_head_measures(measures: BaselineComparisonMeasures) -> list[tuple[str, str, Markup, Markup]]:
    """Return title, unit, chart, and no chart of a change, for each measure of a model with a head."""
    accuracy = _make_chart_estimate("model", measures.accuracy, fixed, 1, 100)
    baseline = (100 * measures.baseline_accuracy, measures.baseline)
    charts = [("Accuracy", "% of the rows", render_interval_chart([accuracy], [baseline]), Markup())]
    if isinstance(measures, ClassificationMeasures):
        chart = render_interval_chart([_make_chart_estimate("model", measures.macro_f1, fixed, 3)])
        charts.append(("Macro-F1", "mean over the classes", chart, Markup()))
    if isinstance(measures, RewardModelMeasures):
        chart = render_interval_chart([_make_chart_estimate("model", measures.margin, fixed, 3)], [(0.0, "")])
        charts.append(("Margin", "reward of the chosen answer above the rejected one's", chart, Markup()))
    return charts


def _make_chart_estimate(
    label: str, estimate: Estimate, to_text: Callable[..., str], digits: int, factor: float = 1
) -> ChartEstimate:
    scaled = Estimate(factor * estimate.value, (factor * estimate.low, factor * estimate.high))
    text = f"{to_text(scaled.value, digits)} ({_format_ends(scaled, digits)})"
    return ChartEstimate(label, "one" if label == "base" else "two", scaled.value, scaled.ci95, text)


def _find_class_table(measures: EvalMeasures) -> ResultTable | None:
    return make_class_table(measures) if isinstance(measures, ClassificationMeasures) else None


def _find_confusion_table(measures: EvalMeasures) -> ResultTable | None:
    return make_confusion_table(measures) if isinstance(measures, ClassificationMeasures) else None


def _check_value(name: str, value: Any) -> str:
    """Return the value of a check of answers as text: a share in per cent."""
    return percent(value, 0) if name == "repetition" else figure(value)


def _forgetting_chart(f: ForgettingMeasures) -> Markup:
    marks = [(0.0, ""), (f.budget, f"budget {fixed(f.budget, 2)}")]
    return render_interval_chart([_make_chart_estimate("change", f.change, signed, 3)], marks)
