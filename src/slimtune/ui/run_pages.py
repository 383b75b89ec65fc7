"""What a run is doing, as its folder and its process say, and what the pages show of runs: any tab can tell, and so can
a page that was started later."""

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from markupsafe import Markup

from ..core.foundation.files import read_json_object, refuse_non_regular_file
from ..core.training.run_dir import LOCK_FILE, WRITER_FILE, RunDir
from ..errors import RunError, SlimtuneError
from ..evaluation.charts import ChartEstimate, ChartLine, is_finite_number, render_interval_chart, render_line_chart
from ..evaluation.eval_result import BaselineComparisonMeasures, LossMeasures, PolicyMeasures
from ..evaluation.run_report import fixed, percent, render_training_charts, signed
from ..evaluation.run_results import (
    RunResults,
    SavedEvaluation,
    find_held_out_evaluation,
    load_run_results,
    parse_evaluations_of_run,
)
from .command_jobs import StartedCommand
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
            writer: dict[str, Any] = read_json_object(file)
        except RunError:
            writer = {}
        if writer.get("host") not in (None, socket.gethostname()):
            return RunStatus("elsewhere", None)
        if _is_training(run, writer):
            return RunStatus("training", writer["process"])
        return RunStatus("done" if run.result_file.is_file() else "killed", None)
    return RunStatus("done" if run.result_file.is_file() else "stopped", None)


def _is_training(run: RunDir, writer: dict[str, Any]) -> bool:
    """Return whether the process that a run's writer file names trains this run.

    The file may come with a folder from elsewhere and name any process: the one that trains has the run's lock open.
    """
    try:
        process = psutil.Process(writer["process"])
        # Numbers of processes are used again: a later process is another one.
        is_same = process.create_time() <= datetime.fromisoformat(writer["started"]).timestamp() + 1
        if not is_same or process.status() == psutil.STATUS_ZOMBIE or "slimtune" not in " ".join(process.cmdline()):
            return False
        lock = run.path / LOCK_FILE
        return any(Path(f.path).name == LOCK_FILE and lock.samefile(f.path) for f in process.open_files())
    except psutil.AccessDenied:  # another user's, to whom no signal can be sent either
        return True
    except (psutil.Error, OSError, KeyError, TypeError, ValueError):
        return False


def find_training_process(root: Path, run: str) -> int | None:
    """Return the process that trains a run, or loads the base for it: a page before this one may have started it.

    Args:
        root: the working folder.
        run: the run folder, relative to it.
    """
    try:
        process = read_run_status(RunDir.open(root / run, require_adapter=False)).process
    except SlimtuneError:  # there is no run yet
        process = None
    for other in psutil.process_iter(["cmdline"]):
        words = other.info["cmdline"] or []
        with contextlib.suppress(psutil.Error):
            if process is None and "train" in words and f"--out={run}" in words and other.cwd() == str(root):
                process = other.pid
    return process


def interrupt_training(process: int) -> None:
    """Send Ctrl-C to a process that trains a run; it writes a checkpoint."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGINT)


def read_last_log_lines(run: RunDir) -> list[str]:
    """Return the last lines of a run's log, from its last `LOG_BYTES`."""
    try:
        refuse_non_regular_file(run.log_file, follow_links=False)
        with run.log_file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - LOG_BYTES))
            lines = f.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > LOG_BYTES else lines


def find_log_warnings(lines: Sequence[str]) -> list[str]:
    """Return what the lines of a log warn of, each once."""
    found = (line.partition(" warning: ") for line in lines)
    return list(dict.fromkeys(warning for _, mark, warning in found if mark))


@dataclass(frozen=True)
class RunPageData:
    """What the page of a training shows."""

    name: str
    """The run."""
    job: StartedCommand | None
    """The training, if the page started it."""
    active: bool
    """Whether it trains."""
    stop_requested: bool = False
    """Whether it was asked to stop, after the step it is in."""
    is_loading: bool = False
    """Whether it trains, and its first step since it was started or resumed is not done."""
    every: int = 2
    """Seconds until the page asks again."""
    missing_run_error: SlimtuneError | None = None
    """Why there is no run folder yet; the fields below are then not known."""
    status: RunStatus | None = None
    """What the run does."""
    results: RunResults | None = None
    """The files of its folder."""
    latest_figures: Mapping[str, Any] = field(default_factory=dict)
    """The latest value of each figure that the page shows."""
    done: float = 0
    """Steps or epochs."""
    total: float = 0
    """Steps or epochs of the whole run; 0: not known."""
    unit: str = ""
    """"steps" or "epochs"."""
    seconds_left: float | None = None
    """Time for the rest at the speed so far, evaluations not counted; None: not known."""
    charts: Sequence[Markup] = ()
    """Losses and other curves."""
    log: Sequence[str] = ()
    """The last lines of its log."""
    warnings: Sequence[str] = ()
    """What its log warns of."""
    events: Sequence[Mapping[str, Any]] = ()
    """The last events in its metrics, such as memory that ran out."""


@dataclass(frozen=True)
class JobPageData:
    """What the pages show of a command that they started."""

    kind: str
    """What it is for, such as "plan"."""
    state: str
    """Whether it runs, and how it ended."""
    job: StartedCommand
    """The command."""
    error: Mapping[str, str]
    """Its error; empty: none."""
    result: Mapping[str, Any]
    """What it printed with --json."""
    charts: Sequence[Markup] = ()
    """Of a plan."""
    is_outdated: bool = False
    """Whether base, rows or settings were changed since."""


@dataclass(frozen=True)
class ChosenRun:
    """The runs to choose from, and the chosen one."""

    runs: Sequence[str]
    """All runs of the folder."""
    run: str
    """The chosen one."""
    results: RunResults = field(default_factory=RunResults)
    """The files of its folder."""
    evaluations: Sequence[SavedEvaluation] = ()
    """What was measured of it."""
    held_out: SavedEvaluation | None = None
    """The evaluation on held-out rows."""
    problem: SlimtuneError | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class RunTableRow:
    """A run in the table of runs."""

    name: str
    """Its folder."""
    problem: str = ""
    """What is wrong with a damaged one."""
    status: RunStatus | None = None
    """What it does."""
    results: RunResults | None = None
    """The files of its folder; None: damaged."""
    held_out_evaluation: SavedEvaluation | None = None
    """The evaluation on held-out rows; None: not measured."""


@dataclass(frozen=True)
class RunComparisonCharts:
    """Several runs side by side."""

    names: list[str]
    """The runs."""
    differences: dict[str, list[str]]
    """Settings that are not the same in all of them, and what each forgot, with the value of each run."""
    losses: Markup
    """Training losses of the first two runs."""
    left_out: list[str]
    """Runs whose losses are not drawn."""
    gains: Markup
    """What each gained on held-out rows."""
    gain_units: list[str]
    """What the gains count."""
    same_rows: bool
    """Whether all were measured on the same rows and base."""
    unmeasured: list[str]
    """Runs that were not measured."""


def make_run_page_data(
    workspace: WorkspaceFolder, name: str, last_job: StartedCommand | None, interrupted: Collection[int] = ()
) -> RunPageData:
    """Return what the page of a training shows.

    Until the base is loaded a run has no folder: then there is only the job.

    Args:
        workspace: the working folder.
        name: the run.
        last_job: the last training that the page started.
        interrupted: processes that got Ctrl-C from the page.
    """
    own = last_job if last_job is not None and last_job.subject == name else None
    active = own is not None and own.state == "running"
    try:
        run = workspace.open_run(name)
        results = load_run_results(run, raise_if_damaged=False)
    except SlimtuneError as e:
        return RunPageData(name, own, active, missing_run_error=e)
    assert results.recipe is not None
    status, train = read_run_status(run), results.recipe.train
    metrics = [m for m in results.metrics if is_finite_number(m.get("step")) and not m.get("event")]
    last: dict[str, Any] = metrics[-1] if metrics else {}
    done, total = float(last.get("step", 0)), float(train.max_steps or 0)
    if not total and is_finite_number(last.get("epoch")):
        done, total = round(float(last["epoch"]), 2), train.epochs
    size = run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
    return RunPageData(
        name,
        own,
        active or status.state == "training",
        every=2 if size < BIG else 15,
        stop_requested=status.process in interrupted or (own is not None and own.stop_requested),
        is_loading=active and own is not None and (not size or run.metrics_file.stat().st_mtime < own.started),
        status=status,
        results=results,
        latest_figures={
            key: next((m[key] for m in reversed(metrics) if key in m), None)
            for key in ("step", "train_loss", "validation_loss", "tokens_per_second", "memory_bytes")
        },
        done=done,
        total=total,
        seconds_left=estimate_seconds_left(last, done, total),
        warnings=find_log_warnings(log := read_last_log_lines(run)),
        unit="steps" if train.max_steps is not None else "epochs",
        charts=render_training_charts(results, results.recipe),
        log=log[-10:],
        events=[m for m in results.metrics if m.get("event")][-3:],
    )


def estimate_seconds_left(metrics: Mapping[str, Any], done: float, total: float) -> float | None:
    """Return the time for the rest of a run at its speed so far, by its last metrics; None: not known."""
    tokens, speed = metrics.get("trained_tokens"), metrics.get("tokens_per_second")
    if not (is_finite_number(tokens) and is_finite_number(speed)) or min(done, total - done, speed or 0) <= 0:
        return None
    return float(tokens) / float(speed) * (total - done) / done


def is_classifier_or_reward_model(results: RunResults) -> bool:
    """Return whether a run trained a classifier or a reward model, which write no text."""
    return results.recipe is not None and results.recipe.objective().task_type == "SEQ_CLS"


def list_set_aside_splits(results: RunResults) -> list[str]:
    """Return the names of the rows that a run has for its evaluation, the better ones first."""
    if results.recipe is None:
        return []
    data = results.recipe.data
    return [s for s in ("test", "validation") if getattr(data, s) is not None or getattr(data, f"{s}_fraction") > 0]


def make_run_table_rows(workspace: WorkspaceFolder, names: Sequence[str]) -> list[RunTableRow]:
    """Return the row of each run in the table of runs; a damaged one has only its name and what is wrong."""
    rows: list[RunTableRow] = []
    for name in names:
        try:
            run = workspace.open_run(name)
            results = load_run_results(run, raise_if_damaged=False)
        except SlimtuneError as e:
            rows.append(RunTableRow(name, problem=e.message))
            continue
        held_out = find_held_out_evaluation(results, parse_evaluations_of_run(results))
        rows.append(RunTableRow(name, status=read_run_status(run), results=results, held_out_evaluation=held_out))
    return rows


def find_setting_differences(runs: Sequence[RunResults]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, with the value of each run as text."""
    settings = [
        {f"{section}.{name}": value for section, values in run.recipe.to_dict().items() if isinstance(values, dict)
         for name, value in values.items()}
        for run in runs if run.recipe is not None
    ]  # fmt: skip
    names = dict.fromkeys(itertools.chain(*settings))
    values = {name: ["–" if s.get(name) is None else str(s[name]) for s in settings] for name in names}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def describe_forgetting(runs: Sequence[RunResults]) -> dict[str, list[str]]:
    """Return what each run forgot, and the strength that its adapter was left with, as text; nothing if none was
    measured."""
    known = [f if isinstance(f := run.result.get("forgetting"), dict) else {} for run in runs]
    if not any(known):
        return {}
    return {
        "forgot, nats per token of general text": [fixed(f.get("change")) for f in known],
        "strength that its adapter was left with": [percent(f.get("strength"), 0) for f in known],
    }


def make_loss_and_gain_comparison_charts(run_table_rows: Sequence[RunTableRow]) -> RunComparisonCharts:
    """Return charts of several runs side by side: the losses of the first two, what each gained on held-out rows."""
    known = [(row, row.results) for row in run_table_rows if row.results is not None]
    series = [
        ChartLine(row.name, color, [(m["step"], m["train_loss"]) for m in results.metrics
                                    if "step" in m and is_finite_number(m.get("train_loss"))], smooth=True)
        for (row, results), color in zip(known, ("one", "two"), strict=False)
    ]  # fmt: skip
    estimates, units, measured_on = [], dict[str, None](), set()
    for at, (row, results) in enumerate(known):
        if row.held_out_evaluation is None:
            continue
        result = row.held_out_evaluation.result
        measures = result.measures
        assert isinstance(measures, LossMeasures | BaselineComparisonMeasures | PolicyMeasures)
        if isinstance(measures, PolicyMeasures):
            gain, unit = measures.reward_gain, "reward"
        elif isinstance(measures, LossMeasures):
            gain, unit = measures.loss_reduction, "nats per token of loss less than the base"
        else:
            gain, unit = measures.accuracy_gain, "share of rows right"
        units[unit] = None
        text = f"{row.name}: {signed(gain.value)} ({fixed(gain.low)} to {fixed(gain.high)})"
        estimates.append(ChartEstimate("", "one" if at == 0 else "two", gain.value, gain.ci95, text))
        assert results.recipe is not None
        measured_on.add((result.data, measures.rows, results.recipe.model.name))
    losses = render_line_chart("Training loss", "nats per supervised token", series, tall=True) if series else Markup()
    return RunComparisonCharts(
        names=[row.name for row, _ in known],
        differences=find_setting_differences(runs := [results for _, results in known]) | describe_forgetting(runs),
        losses=losses,
        left_out=[row.name for row, _ in known[2:]],
        gains=render_interval_chart(estimates, [(0.0, "")]),
        gain_units=list(units),
        same_rows=len(measured_on) < 2,
        unmeasured=[row.name for row, _ in known if row.held_out_evaluation is None],
    )
