"""report.html: one run on one page, made only from the files in its folder, so it can be written again at any time.

The page is one HTML file without network, scripts or fonts. The template escapes every text of the run, and a path is
shown relative to the working directory or by its name alone.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..config import Recipe
from ..errors import UsageError
from ..run_dir import RunDir, RunResults, write_atomic
from ..utils.formatting import format_bytes, format_count, format_duration
from .charts import (
    Estimate,
    Series,
    histogram,
    html_templates,
    interval_chart,
    is_interval,
    is_number,
    line_chart,
    stacked_bar,
)

DASH = "–"
Rows = list[tuple[str, str]]


def write_report(run: RunDir, out: Path | None = None) -> Path:
    """Write the page of a run, replacing an earlier one; return its path.

    Args:
        run: the run.
        out: the file; None: `report.html` in the run folder.

    Raises:
        UsageError: there is no recipe, or no folder for `out`.
        RecipeError: the recipe has errors.
        RunError: the disk is full.
    """
    file = run.report_file if out is None else out.expanduser()
    if file.is_dir() or not file.parent.is_dir():
        problem = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.parent}"
        raise UsageError(f"{file} {problem}", "a file in an existing folder", "--out report.html")
    write_atomic(file, render_report(run))
    return file


def render_report(run: RunDir) -> str:
    """Return the page of a run as HTML. A missing file is named with the command that creates it."""
    r = run.load_results(strict=False)
    assert r.recipe is not None
    return _render_page(
        name=run.path.resolve().name,
        model=_display_path(r.recipe.model.name),
        recipe=r.recipe,
        results=r,
        errors=[e.replace(f"{run.path}{os.sep}", "") for e in r.errors],
        figures=_headline_figures(r),
        missing=_missing_parts(r, run),
        recipe_rows=_recipe_rows(r.recipe),
        recipe_text=_recipe_text(r.recipe),
        memory=_memory_charts(r),
        plan_rows=_plan_rows(r),
        data_reports={k: v for k in ("train", "validation") if isinstance(v := r.data.get(k), Mapping)},
        training=_training_charts(r),
        evaluations=[(e.name, e.values, _evaluation_charts(e.values)) for e in r.evaluations],
        samples=next(((e.name, e.values) for e in r.evaluations if e.values.get("generations")), None),
        forgetting=next((f for e in r.evaluations if (f := e.values.get("forgetting"))), None),
        exports=_export_commands(r, run),
        details=_detail_rows(r.result),
        oom_events=[m for m in r.metrics if m.get("event") == "out of memory"],
    )


def render_data_report(report: Mapping[str, Any]) -> str:
    """Return what `slimtune data --json` prints as a page of its own."""
    return _render_page(name=_display_path(report["file"]), report=report)


def _render_page(**values: Any) -> str:
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    tools: dict[str, Any] = {
        "fixed": fixed,
        "signed": signed,
        "percent": percent,
        "whole": whole,
        "figure": lambda x: f"{x:.4g}" if is_number(x) else DASH,
        "display_path": _display_path,
        "length_histogram": _length_histogram,
        "forgetting_chart": _forgetting_chart,
    }
    page = html_templates().get_template("report.html.j2")
    return page.render(**values, **tools, style=Markup(style), version=__version__)


# --- text of values; whatever is not a finite number becomes a dash --------------------------------------------------


def fixed(value: Any, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals."""
    return f"{value:.{digits}f}".replace("-", "−") if is_number(value) else DASH


def signed(value: Any, digits: int = 3) -> str:
    """Return a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−") if is_number(value) else DASH


def percent(value: Any, digits: int = 1) -> str:
    """Return a share as per cent."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else DASH


def whole(value: Any) -> str:
    """Return a rounded number."""
    return f"{round(value):,}" if is_number(value) else DASH


def _size(value: Any) -> str:
    return format_bytes(value) if is_number(value) else DASH


def _duration(value: Any) -> str:
    return format_duration(value) if is_number(value) else DASH


def _range(low: Any, high: Any, to_text: Callable[[Any], str]) -> str:
    return " to ".join(dict.fromkeys((to_text(low), to_text(high))))


def _with_interval(value: Any, interval: Any, to_text: Callable[[Any], str], digits: int) -> str:
    text = to_text(value)
    if not is_interval(interval):
        return text
    return f"{text} ({_range(interval[0], interval[1], lambda x: fixed(x, digits))})"


def _display_path(path: str | Path) -> str:
    """Return a path relative to the working directory, or only its name where it is outside."""
    if not Path(path).is_absolute():
        return str(path)
    place, here = Path(os.path.abspath(path)), Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name


def _command(verb: str, *arguments: str) -> str:
    return shlex.join(["slimtune", verb, *arguments])


# --- the sections in their order -------------------------------------------------------------------------------------


def _headline_figures(r: RunResults) -> list[tuple[str, str, str]]:
    """Return the most important figures: value, name and note."""
    result, figures = r.result, []
    if r.evaluations:
        name, v = r.evaluations[0].name, r.evaluations[0].values
        interval = v.get("loss_reduction_ci95")
        note = (
            f"{_range(interval[0], interval[1], lambda x: fixed(x, 2))}, {name} rows" if is_interval(interval) else name
        )
        figures.append((signed(v.get("loss_reduction"), 2), "loss reduction, nats per token", note))
    if is_number(result.get("validation_loss")):
        figures.append((fixed(result["validation_loss"]), "validation loss", "nats per supervised token"))
    if result:
        share = result.get("trainable_params", 0) / max(result.get("total_params") or 1, 1)
        figures += [
            (percent(share, 2), "parameters trained", ""),
            (_size(result.get("adapter_bytes")), "adapter", ""),
            (_duration(result.get("train_seconds")), "training", f"{whole(result.get('tokens_per_second'))} tokens/s"),
            (_size(result.get("peak_bytes")), "peak memory", ""),
        ]
    return figures


def _missing_parts(r: RunResults, run: RunDir) -> dict[str, list[tuple[str, str]]]:
    """Return what no file contains, by section: what it is, and the command that creates it."""
    assert r.recipe is not None
    data, folder = r.recipe.data, _display_path(run.path)
    recipe_file = f"{folder}/{run.recipe_file.name}"
    resume = _command("train", recipe_file, "--resume")
    rows = ["--data", "HELD_OUT.jsonl"]
    if data.test is not None:
        rows = []
    elif data.validation is not None or data.validation_fraction > 0:
        rows = ["--split", "validation"]
    evaluate = _command("eval", folder, *rows)
    model = _display_path(r.recipe.model.name)
    logged = [key for key in ("train_loss", "validation_loss") if any(key in m for m in r.metrics)]
    measured = [e.values for e in r.evaluations]
    parts: dict[str, list[tuple[str, str] | None]] = {
        "plan": [
            ("not planned", _command("plan", recipe_file)) if not r.plan else None,
            ("not measured", resume) if r.plan and not r.result else None,
        ],
        "data": [
            ("not validated", _command("data", _display_path(data.train), "--model", model)) if not r.data else None
        ],
        "training": [
            ("no loss was logged", resume) if not logged else None,
            ("no validation loss", _command("train", "--validation", "ROWS.jsonl"))
            if logged == ["train_loss"]
            else None,
        ],
        "evaluation": [
            ("not measured", evaluate) if not measured else None,
            ("accuracy was not measured", evaluate)
            if measured and not any("tuned_accuracy" in v for v in measured)
            else None,
        ],
        "samples": [
            ("not generated", f"{evaluate} --generate 8"),
            ("or talk to both", _command("chat", folder, "--side-by-side")),
        ]
        if not any(v.get("generations") for v in measured)
        else [],
        "forgetting": [("not measured", evaluate) if not any(v.get("forgetting") for v in measured) else None],
        "export": [
            ("export formats were not recorded", _command("methods", r.recipe.method.name))
            if not isinstance(r.result.get("export_formats"), dict)
            else None
        ],
        "details": [("not finished", resume) if not r.result else None],
    }
    return {section: [part for part in found if part] for section, found in parts.items()}


def _recipe_rows(recipe: Recipe) -> Rows:
    model, data, method, train = recipe.model, recipe.data, recipe.method, recipe.train
    storage = f"linear layers in {model.quantization}" if model.quantization else f"dtype {model.dtype}"
    settings = ", ".join(f"{k} {v}" for k, v in method.settings.items() if v not in (None, {}, [], False))
    validation = f"{100 * data.validation_fraction:g} % of the training rows"
    epochs = f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
    return [
        ("base", f"{_display_path(model.name)}, {storage}"),
        ("method", f"{method.name}{f' ({settings})' if settings else ''}"),
        ("training rows", _display_path(data.train)),
        ("validation rows", _display_path(data.validation) if data.validation else validation),
        ("test rows", _display_path(data.test) if data.test else "none"),
        ("longest row", f"{data.max_seq_len:,} tokens; longer ones: {data.on_overlong}"),
        ("length of training", f"{train.max_steps} steps" if train.max_steps else epochs),
        ("rows per step", f"{train.batch_size * train.gradient_accumulation_steps}"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler}"),
        ("seed", f"{train.seed}"),
    ]


def _recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML, with absolute paths shortened."""
    return re.sub(
        r"(?m)^((?:[ -]*|[ \w-]*[\w]: )['\"]?)(/[^\n]*?)(['\"]?)$",
        lambda found: found[1] + _display_path(found[2]) + found[3],
        recipe.to_yaml(),
    )


def _peaks(r: RunResults) -> tuple[Any, Any, Any]:
    """Return the lowest and highest planned peak and the measured one: of the process, on a GPU of its tensors."""
    if str(r.result.get("device", "")).startswith("cuda"):
        low = high = r.plan.get("allocated_bytes")
    else:
        low, high = ((r.plan.get("need_bytes") or {}).get(k) for k in ("low", "high"))
    return low, high, r.result.get("peak_bytes")


def _memory_charts(r: RunResults) -> list[Markup]:
    low, high, peak = _peaks(r)
    parts = r.plan.get("parts") or {}
    charts = [stacked_bar("Memory of a step, by part", parts, predicted=(low, high), measured=peak)]
    usable = (r.plan.get("usable_bytes") or {}).get("low")
    if is_number(usable) and usable and is_number(high):
        title = f"Share of the memory of {r.plan.get('card', 'the machine')}"
        note = f"at most {percent(high / usable)} of {format_bytes(usable)} is planned"
        charts.append(stacked_bar(title, {"need": high}, note=note, measured=peak, capacity=usable))
    return [c for c in charts if c]


def _plan_rows(r: RunResults) -> list[tuple[str, str, str, bool | None]]:
    """Return what was planned and measured: name, planned, measured, and whether they agree (None: unknown)."""

    def agrees(value: Any, low: Any, high: Any) -> bool | None:
        return low <= value <= high if all(map(is_number, (value, low, high))) else None

    plan, result, probe, (low, high, peak) = r.plan, r.result, r.probe, _peaks(r)
    rows = [("peak memory", _range(low, high, _size), _size(peak), agrees(peak, low, high) if low != high else None)]
    if probe:
        name = f"longest micro-batch, {whole(probe.get('tokens'))} tokens"
        planned = _range(probe.get("low"), probe.get("high"), _size)
        rows.append((name, planned, _size(probe.get("bytes")), probe.get("as_planned")))
    for name, key, to_text in (
        ("parameters trained", "trainable_params", whole),
        ("adapter file", "adapter_bytes", _size),
    ):
        rows.append((name, to_text(plan.get(key)), to_text(result.get(key)), None))
    speed = plan.get("tokens_per_second") or {}
    slow: Any = speed.get("low")
    fast: Any = speed.get("high")
    tokens, measured = result.get("trained_tokens"), result.get("tokens_per_second")
    planned = _range(slow, fast, whole) if speed else "unknown"
    rows.append(("tokens/s", planned, whole(measured), agrees(measured, slow, fast)))
    known = all(is_number(x) and x > 0 for x in (slow, fast)) and is_number(tokens)
    planned = _range(tokens / fast, tokens / slow, format_duration) if known else "unknown"
    rows.append(("time of the training steps", planned, _duration(result.get("train_seconds")), None))
    return rows


def _length_histogram(report: Mapping[str, Any]) -> Markup:
    lengths = report.get("lengths") or {}
    shares = {"median": "median", "90 % up to": "p90", "longest": "max"}
    note = "tokens: " + ", ".join(f"{name} {whole(lengths.get(key))}" for name, key in shares.items())
    return histogram(lengths.get("histogram") or [], report.get("max_seq_len"), note)


def _training_charts(r: RunResults) -> list[Markup]:
    assert r.recipe is not None

    def series(name: str, key: str, color: str = "one", markers: bool = False) -> Series:
        return Series(name, color, [(m["step"], m[key]) for m in r.metrics if "step" in m and key in m], markers)

    losses = [series("training", "train_loss"), series("validation", "validation_loss", "two", markers=True)]
    scheduler = r.recipe.train.lr_scheduler.replace("_", " ")
    charts = [
        line_chart("Loss", "nats per supervised token", losses, tall=True),
        line_chart("Learning rate", scheduler, [series("learning rate", "learning_rate")]),
        line_chart("Speed", "trained tokens/s", [series("speed", "tokens_per_second")]),
        line_chart("Gradient norm", "before clipping", [series("gradient norm", "grad_norm")]),
    ]
    return [c for c in charts if c]


def _evaluation_charts(v: Mapping[str, Any]) -> list[tuple[str, str, Markup, Markup]]:
    """Return title, unit, chart of base and tuned model, and chart of the change, for each measure."""
    dependence = v.get("prompt_dependence") or {}
    measures = [
        ("Loss", "nats per token, lower is better", v, "{}_loss", "loss_reduction", 3, 1),
        ("Perplexity", "lower is better", v, "{}_perplexity", "", 2, 1),
        ("Accuracy", "% of tokens predicted, higher is better", v, "{}_accuracy", "accuracy_gain", 1, 100),
        ("Prompt dependence", "nats per token lost with another row's prompt", dependence, "{}", "change", 3, 1),
    ]
    charts = []
    for title, unit, values, key, change_key, digits, factor in measures:
        both = [
            _estimate(label, color, values, key.format(label), fixed, digits, factor)
            for label, color in (("base", "one"), ("tuned", "two"))
        ]
        change = [_estimate("change", "two", values, change_key, signed, digits, factor)] if change_key else []
        if chart := interval_chart(both):
            charts.append((title, unit, chart, interval_chart(change, [(0.0, "")])))
    return charts


def _estimate(
    label: str, color: str, values: Mapping[str, Any], key: str, to_text: Callable[..., str], digits: int, factor: float
) -> Estimate:
    value, interval = values.get(key), values.get(f"{key}_ci95")
    value = value * factor if is_number(value) else None
    interval = [x * factor for x in interval] if is_interval(interval) else None
    return Estimate(
        label, color, value, interval, _with_interval(value, interval, lambda x: to_text(x, digits), digits)
    )


def _forgetting_chart(f: Mapping[str, Any]) -> Markup:
    marks = [(0.0, "")]
    if is_number(f.get("budget")):
        marks.append((f["budget"], f"budget {fixed(f['budget'], 2)}"))
    return interval_chart([_estimate("change", "two", f, "change", signed, 3, 1)], marks)


def _export_commands(r: RunResults, run: RunDir) -> list[tuple[str, list[str], str]]:
    """Return what the adapter can be exported to: name, commands in their order, and a note."""
    name, folder = run.path.resolve().name, _display_path(run.path)
    commands = [_command("chat", folder, "--side-by-side"), _command("generate", folder, "PROMPT")]
    exports = [("Use it", commands, "")]
    formats = r.result.get("export_formats")
    if not isinstance(formats, dict):
        return exports
    merged, as_gguf, from_gguf = formats.get("merged"), formats.get("gguf"), formats.get("base_kind") == "gguf"
    converter = "" if from_gguf else "The base is not a GGUF file: set LLAMA_CPP to a checkout of llama.cpp."

    def add(title: str, to: str, *options: str, note: str = "") -> None:
        exports.append((title, [_command("export", folder, "--to", to, "--out", f"{name}-{to}", *options)], note))

    if merged:
        serve = shlex.join(["vllm", "serve", f"{name}-merged"])
        commands = [_command("merge", folder, "--out", f"{name}-merged"), serve]
        exports.append(("One plain model, for transformers and vLLM", commands, ""))
    if as_gguf:
        add("llama.cpp, adapter beside the base", "gguf")
    elif merged:
        add("llama.cpp, one model", "gguf", "--merged", note=converter)
    if as_gguf and from_gguf:
        add("Ollama, adapter beside the base", "ollama")
    elif merged:
        add("Ollama, one model", "ollama", "--merged", note=converter)
    if formats.get("vllm"):
        add("vLLM, adapter beside the base", "vllm")
    elif formats.get("as_lora"):
        note = "The command measures what the approximation loses."
        add("vLLM, as the nearest LoRA", "vllm", "--convert-to-lora", "64", note=note)
    exports.append(("Hugging Face Hub", [_command("push", folder, f"YOUR_NAME/{name}")], ""))
    if merged or as_gguf:
        exports.append(("Check that every export equals the trained adapter", [_command("verify", folder)], ""))
    return exports


def _detail_rows(result: Mapping[str, Any]) -> Rows:
    if not result:
        return []
    trained, total = result.get("trainable_params"), result.get("total_params")
    parameters = (
        f"{format_count(trained)} of {format_count(total)}" if is_number(trained) and is_number(total) else DASH
    )
    early = ", stopped early" if result.get("stopped_early") else ""
    supervised = whole(result.get("supervised_tokens"))
    return [
        ("steps", f"{whole(result.get('steps'))}{early}; the adapter is from step {whole(result.get('best_step'))}"),
        ("trained tokens", f"{whole(result.get('trained_tokens'))}, {supervised} of them supervised"),
        ("training steps", _duration(result.get("train_seconds"))),
        ("loading the base", _duration(result.get("load_seconds"))),
        ("dequantizing the base", _duration(result.get("prepare_seconds"))),
        ("parameters trained", parameters),
        ("adapter", f"{whole(result.get('adapter_bytes'))} bytes"),
        ("peak memory", _size(result.get("peak_bytes"))),
        ("weights", f"{result.get('quantization') or result.get('dtype', DASH)} on {result.get('device', DASH)}"),
    ]
