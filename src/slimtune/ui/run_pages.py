"""What a run is doing, as its folder and its process say, and what the pages show of runs: any tab can tell, and so can
a page that was started later."""

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import psutil
from markupsafe import Markup

from ..core.foundation.files import read_json, require_regular_file
from ..core.training.run_dir import WRITER_FILE, RunDir
from ..errors import RunError, SlimtuneError
from ..evaluation.charts import ChartEstimate, ChartLine, is_finite_number, render_interval_chart, render_line_chart
from ..evaluation.eval_result import BaselineComparisonMeasures, LossMeasures
from ..evaluation.run_report import fixed, render_training_charts, signed
from ..evaluation.run_results import RunResults, find_held_out_evaluation, load_run_results, read_saved_evaluations
from .command_jobs import CommandJob
from .workspace import WorkspaceFolder

BIG = 1 << 20
"""Bytes of metrics from which the live part is drawn less often."""
State = Literal["training", "done", "stopped", "killed", "elsewhere"]
LOG_BYTES = 1 << 14
"""Bytes at the end of a log that are shown."""
WORDS = {
    "training": "trains",
    "done": "finished",
    "stopped": "stopped before its end",
    "killed": "was killed; what is after its last checkpoint is lost",
    "elsewhere": "trains on another machine, or did when that machine went",
}


class RunStatus(NamedTuple):
    """State of a run, and the process that trains it."""

    state: State
    process: int | None  # of this machine; None if none trains

    @property
    def words(self) -> str:
        """The state, as the end of a sentence."""
        return WORDS[self.state]


def read_run_status(run: RunDir) -> RunStatus:
    """Return the state of a run."""
    file = run.path / WRITER_FILE
    if file.is_file():
        try:
            writer: dict[str, Any] = read_json(file)
        except RunError:
            writer = {}
        if writer.get("host") not in (None, socket.gethostname()):
            return RunStatus("elsewhere", None)
        if _is_training(writer):
            return RunStatus("training", writer["process"])
        return RunStatus("done" if run.result_file.is_file() else "killed", None)
    return RunStatus("done" if run.result_file.is_file() else "stopped", None)


def _is_training(writer: dict[str, Any]) -> bool:
    """Return whether the process that a run's writer file names is still the one that wrote it."""
    try:
        process = psutil.Process(writer["process"])
        # Numbers of processes are used again: a later process is another one.
        is_same = process.create_time() <= datetime.fromisoformat(writer["started"]).timestamp() + 1
        return is_same and process.status() != psutil.STATUS_ZOMBIE and "slimtune" in " ".join(process.cmdline())
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def interrupt_training(run: RunDir) -> bool:
    """Send Ctrl-C to the process that trains a run, which writes a checkpoint; return whether there is one."""
    process = read_run_status(run).process
    if process is None:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGINT)
    return True


def read_log_tail(run: RunDir) -> list[str]:
    """Return the last lines of a run's log, from its last `LOG_BYTES`."""
    try:
        require_regular_file(run.log_file, follow_links=False)
        with run.log_file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - LOG_BYTES))
            lines = f.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > LOG_BYTES else lines


def make_run_page_data(workspace: WorkspaceFolder, name: str, job: CommandJob | None) -> dict[str, Any]:
    """Return what the page of a training shows; `job` is the last training that the page started.

    Until the base is loaded a run has no folder: then there is only the job.
    """
    own = job if job is not None and job.subject == name else None
    view: dict[str, Any] = {"name": name, "job": own, "active": own is not None and own.state == "running"}
    try:
        run = workspace.open_run(name)
        results = load_run_results(run, strict=False)
    except SlimtuneError as e:
        return {**view, "missing": e, "every": 2}
    assert results.recipe is not None
    status, train = read_run_status(run), results.recipe.train
    metrics = [m for m in results.metrics if is_finite_number(m.get("step")) and not m.get("event")]
    last: dict[str, Any] = metrics[-1] if metrics else {}
    done, total = float(last.get("step", 0)), float(train.max_steps or 0)
    if not total and is_finite_number(last.get("epoch")):
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
        "charts": render_training_charts(results, results.recipe),
        "log": read_log_tail(run)[-10:],
        "events": [m for m in results.metrics if m.get("event")][-3:],
        "every": 2 if size < BIG else 15,
    }  # fmt: skip


def is_classifier_or_reward_model(results: RunResults) -> bool:
    """Return whether a run trained a classifier or a reward model, which write no text."""
    return results.recipe is not None and results.recipe.objective().task_type == "SEQ_CLS"


def make_run_table_rows(workspace: WorkspaceFolder, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the row of each run in the table of runs; a damaged one has only its name and what is wrong."""
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            run = workspace.open_run(name)
            results = load_run_results(run, strict=False)
        except SlimtuneError as e:
            rows.append({"name": name, "problem": e.message})
            continue
        held_out = find_held_out_evaluation(results, read_saved_evaluations(results))
        rows.append({"name": name, "status": read_run_status(run), "results": results, "held_out": held_out})
    return rows


def make_run_comparison_charts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return charts of several runs side by side: the losses of the first two, what each gained on held-out rows."""
    rows = [row for row in rows if "results" in row]
    series = [
        ChartLine(row["name"], color, [(m["step"], m["train_loss"]) for m in row["results"].metrics
                                    if "step" in m and is_finite_number(m.get("train_loss"))], smooth=True)
        for row, color in zip(rows, ("one", "two"), strict=False)
    ]  # fmt: skip
    measured = [(row, row["held_out"].result) for row in rows if row["held_out"] is not None]
    estimates = []
    for row, result in measured:
        measures = result.measures
        assert isinstance(measures, LossMeasures | BaselineComparisonMeasures)
        gain = measures.loss_reduction if isinstance(measures, LossMeasures) else measures.accuracy_gain
        text = f"{row['name']}: {signed(gain.value)} ({fixed(gain.low)} to {fixed(gain.high)})"
        estimates.append(ChartEstimate("", "two", gain.value, gain.ci95, text))
    rows_of = {(r.data, r.measures.rows, row["results"].recipe.model.name) for row, r in measured}
    unmeasured = [row["name"] for row in rows if row["held_out"] is None]
    return {
        "losses": render_line_chart("Training loss", "nats per supervised token", series, tall=True)
        if series
        else Markup(),
        "left_out": [row["name"] for row in rows[2:]],
        "gains": render_interval_chart(estimates, [(0.0, "")]),
        "same_rows": len(rows_of) < 2,
        "unmeasured": unmeasured,
    }
