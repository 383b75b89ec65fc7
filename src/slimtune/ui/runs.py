"""What the pages show of runs: their state, what was measured, and several of them side by side."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..errors import SlimtuneError
from ..reporting.charts import Estimate, Series, interval_chart, is_interval, is_number, line_chart
from ..reporting.report import fixed, signed, training_charts
from ..run_dir import RunResults
from .jobs import Job
from .run_status import read_log, read_status
from .workspace import Workspace

BIG = 1 << 20
"""Bytes of metrics from which the live part is drawn less often."""


def view_run(workspace: Workspace, name: str, job: Job | None) -> dict[str, Any]:
    """Return what the page of a training shows; `job` is the last training that the page started.

    Until the base is loaded a run has no folder: then there is only the job.
    """
    own = job if job is not None and job.subject == name else None
    view: dict[str, Any] = {"name": name, "job": own, "active": own is not None and own.state == "running"}
    try:
        run = workspace.open_run(name)
        results = run.load_results(strict=False)
    except SlimtuneError as e:
        return {**view, "missing": e, "every": 2}
    assert results.recipe is not None
    status, train = read_status(run), results.recipe.train
    metrics = [m for m in results.metrics if is_number(m.get("step")) and not m.get("event")]
    last: dict[str, Any] = metrics[-1] if metrics else {}
    done, total = float(last.get("step", 0)), float(train.max_steps or 0)
    if not total and is_number(last.get("epoch")):
        done, total = round(float(last["epoch"]), 2), train.epochs
    size = run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
    return {
        **view,
        "status": status,
        "active": view["active"] or status.state == "training",
        "results": results,
        "recipe": results.recipe,
        "last": {key: next((m[key] for m in reversed(metrics) if key in m), None)
                 for key in ("step", "train_loss", "validation_loss", "tokens_per_second", "memory_bytes")},
        "done": done,
        "total": total,
        "unit": "steps" if train.max_steps is not None else "epochs",
        "charts": training_charts(results, results.recipe),
        "log": read_log(run)[-10:],
        "events": [m for m in results.metrics if m.get("event")][-3:],
        "every": 2 if size < BIG else 15,
    }  # fmt: skip


def is_classifier(results: RunResults) -> bool:
    """Return whether a run trained a classifier or a reward model, which write no text."""
    return results.recipe is not None and results.recipe.objective().task_type == "SEQ_CLS"


def list_rows_of_runs(workspace: Workspace, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the row of each run in the table of runs; a damaged one has only its name and what is wrong."""
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            run = workspace.open_run(name)
            results = run.load_results(strict=False)
        except SlimtuneError as e:
            rows.append({"name": name, "problem": e.message})
            continue
        rows.append({"name": name, "status": read_status(run), "results": results, "held_out": results.held_out})
    return rows


def compare_runs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return charts of several runs side by side: the losses of the first two, what each gained on held-out rows."""
    rows = [row for row in rows if "results" in row]
    series = [
        Series(row["name"], color, [(m["step"], m["train_loss"]) for m in row["results"].metrics
                                    if "step" in m and is_number(m.get("train_loss"))], smooth=True)
        for row, color in zip(rows, ("one", "two"), strict=False)
    ]  # fmt: skip
    measured = [(row, row["held_out"].values) for row in rows if row["held_out"] is not None]
    estimates = []
    for row, values in measured:
        key = "loss_reduction" if "loss_reduction" in values else "accuracy_gain"
        interval = values.get(f"{key}_ci95")
        ends = f" ({fixed(interval[0])} to {fixed(interval[1])})" if is_interval(interval) else ""
        text = f"{row['name']}: {signed(values.get(key))}{ends}"
        estimates.append(Estimate("", "two", values.get(key), interval, text))
    rows_of = {(v.get("data"), v.get("rows"), row["results"].recipe.model.name) for row, v in measured}
    unmeasured = [row["name"] for row in rows if row["held_out"] is None]
    return {
        "losses": line_chart("Training loss", "nats per supervised token", series, tall=True) if series else Markup(),
        "left_out": [row["name"] for row in rows[2:]],
        "gains": interval_chart(estimates, [(0.0, "")]),
        "same_rows": len(rows_of) < 2,
        "unmeasured": unmeasured,
    }
