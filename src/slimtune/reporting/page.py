"""The page: sections put into one HTML file with its style inside; everything of a run's is escaped."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2

from .. import __version__
from ..errors import UsageError
from ..run_dir import RunDir, write_atomic
from .charts import is_number
from .record import Record, load_record
from .sections import ORDER
from .words import FILTERS, duration, fixed, interval, percent, signed, size

TEMPLATES = "templates"


def write_report(run: RunDir, out: Path | None = None) -> Path:
    """Write the page of a run from the files in its folder, over the one that is there; return where.

    Args:
        run: the run.
        out: the file; None: `report.html` in the run folder.

    Raises:
        UsageError: there is no recipe, or no folder to write `out` into.
        RecipeError: the recipe holds faults.
        RunError: the disk is full.
    """
    file = run.report_file if out is None else out.expanduser()
    if file.is_dir() or not file.parent.is_dir():
        what = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.parent}"
        raise UsageError(f"{file} {what}", "a file in a folder that is there", "--out report.html")
    write_atomic(file, render_page(run))
    return file


def render_page(run: RunDir) -> str:
    """Return the page of a run as HTML; errors as `write_report`, the disk's apart."""
    record = load_record(run)
    style = files(__package__).joinpath(TEMPLATES, "report.css").read_text(encoding="utf-8")
    page = _templates().get_template("page.html")
    return page.render(
        name=run.path.resolve().name,
        run=record,
        style=style,
        figures=_figures(record),
        sections=[s.section(record) for s in ORDER],
        version=__version__,
    )


@cache
def _templates() -> jinja2.Environment:
    # A key that a file lacks reads as a dash: what is not measured is no fault.
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(FILTERS)
    return made


def _figures(run: Record) -> list[tuple[str, str, str]]:
    """Return what a run comes to: figure, what it is, and what stands beside it."""
    r, found = run.result, []
    if run.evaluations:
        name, v = run.evaluations[0]
        around = interval(v.get("loss_reduction_ci95"), 2)
        found.append(
            (signed(v.get("loss_reduction"), 2), "gain, nats a token", f"{around}, {name} rows" if around else name)
        )
    if is_number(r.get("validation_loss")):
        found.append((fixed(r["validation_loss"]), "validation loss", "nats a learned token"))
    if r:
        share = r.get("trainable_params", 0) / max(r.get("total_params") or 1, 1)
        found += [
            (percent(share, 2), "parameters trained", ""),
            (size(r.get("adapter_bytes")), "adapter", ""),
            (duration(r.get("train_seconds")), "training", f"{fixed(r.get('tokens_per_second'), 0)} tokens a second"),
            (size(r.get("peak_bytes")), "peak memory", ""),
        ]
    return found
