"""`slimtune data`: a report on training rows before any training."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Argument, Option

from ..core.foundation.files import write_atomic
from ..core.foundation.formatting import escape_control_characters
from ..errors import DataError
from ..evaluation.output_files import resolve_page_file
from .common import ERROR, GOOD, WARNING, Json, NegativeVerdictResult, make_console, print_fields, print_progress
from .input_checks import require_base_exists, require_row_files_exist
from .options import add_recipe_flags
from .planned_jobs import ROW_SETTINGS
from .row_checks import has_valid_first_row

if TYPE_CHECKING:
    from ..evaluation.data_report.data_report import DataReport

STYLES = {
    "error": ERROR, "errors": ERROR, "warning": WARNING, "warnings": WARNING, "not checked": WARNING,
    "ok": f"bold {GOOD}",
}  # fmt: skip
BAR_WIDTH = 40
SAMPLE_CHARACTERS = 480
"""Characters of a sample on the screen, so that three samples leave room for the verdict; --json has more."""
FEW_ROWS = 100
"""Fewer answers get a note; docs/learn/data_that_works.md has the numbers to begin with."""
REPORT_SETTINGS = (
    "model.name", "model.revision", "model.trust_remote_code", "data.validation", *ROW_SETTINGS,
    "data.split_special_tokens", "train.batch_size",
)  # fmt: skip
"""The settings that change the report."""


@add_recipe_flags(*REPORT_SETTINGS)
def data_report(
    file: Annotated[str, Argument(metavar="FILE", help="A file or folder of rows.", show_default=False)],
    settings: dict[str, Any],
    html: Annotated[Path | None, Option(help="Write the report as an HTML page to this file.")] = None,
    show: Annotated[
        int | None,
        Option(
            "--show",
            min=0,
            max=1000,
            help="Print so many of the first rows as text, what is learned marked. "
            "[default: 3, shortened, with --model]",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Treat warnings as errors.")] = False,
    as_json: Json = False,
) -> Any:
    """Report on rows before any training.

    Lengths, what contributes to the loss, and rows that are invalid, duplicated or broken. Exit code 1 if training
    would refuse them. Without --model, only rows and columns are counted.
    """
    if html is not None:
        html = resolve_page_file(html)
    for rows in (file, settings.get("data.validation")):
        require_row_files_exist(rows, settings.get("data.format"))
    if "model.name" in settings:
        require_base_exists(str(settings["model.name"]))
    from ..core.config.recipe import parse_recipe_sections
    from ..core.config.recipe_loading import replace_recipe_values
    from ..evaluation.data_report.report_builder import make_data_report

    tree = replace_recipe_values({}, {"data.train": str(file), **settings})
    sections = parse_recipe_sections(tree, "the flags", partial=True)
    data, train = sections["data"], sections["train"]
    tokenizer, model = None, None
    if "model.name" in settings or "model" in settings:
        model = sections["model"].name
        if has_valid_first_row(data):  # otherwise nothing is tokenized, and a base's tokenizer takes long to load
            from ..core.training.base_model import load_base_tokenizer

            tokenizer = load_base_tokenizer(sections["model"], data.chat_template)
    report = make_data_report(
        file,
        tokenizer,
        model=model,
        format=data.format,
        columns=data.columns,
        ignore_columns=data.ignore_columns,
        split_special_tokens=data.split_special_tokens,
        apply_chat_template=data.apply_chat_template,
        train_on=data.train_on,
        max_seq_len=data.max_seq_len,
        on_overlong=data.on_overlong,
        rows_per_step=train.rows_per_step,
        validation=data.validation,
        shown_row_count=show,
    )
    if html is not None:
        from ..core.foundation.json_results import to_json_dict
        from ..evaluation.run_report import render_data_report_page

        write_atomic(html, render_data_report_page(to_json_dict(report)))
        print_progress(f"page: {html}")
    if not as_json:
        _print_report(report, SAMPLE_CHARACTERS if show is None else None)
    good = report.verdict == "ok" or (report.verdict != "errors" and not strict)
    return report if good else NegativeVerdictResult(report)


def _print_report(report: "DataReport", sample_characters: int | None) -> None:
    """Print a report for people. Supervised text is colored, or between ⟦ and ⟧ where there are no colors.

    `sample_characters` are the most of a sample; None: all that the report has.
    """
    screen = make_console()
    reader = f" for {report.model}" if report.model is not None else ""
    rows = "rows of an unknown format" if report.format == "unknown" else f"{report.format} rows"
    screen.print(f"{report.file}: {rows}{reader}")
    reading = "as the model reads it" if report.model is not None else "as it is read"
    for sample in report.samples:
        marks = "; supervised text is marked" * any(piece.supervised for piece in sample.pieces)
        name = escape_control_characters(f", {sample.name}" * bool(sample.name))
        screen.print(Text(f"\nline {sample.line}{name}, {reading}{marks}", "dim"))
        text, left = Text(), sample_characters or sys.maxsize
        for piece in sample.pieces:
            marked = piece.supervised and not screen.is_terminal
            shown = escape_control_characters(piece.text[:left]) + "…" * (0 < left < len(piece.text))
            left = max(0, left - len(piece.text))
            if shown:
                text.append(f"⟦{shown}⟧" if marked else shown, f"{GOOD} underline" * piece.supervised)
        screen.print(text)
    screen.print()
    print_fields(report.lines())
    histogram = report.lengths.histogram
    most = max((bar.rows for bar in histogram), default=0)
    for bar in histogram:
        lengths = f"{bar.low}–{bar.high}"
        screen.print(f"{lengths:>11} {'█' * -(-BAR_WIDTH * bar.rows // most)} {bar.rows or ''}")
    for issue in report.issues:
        severity = issue.severity
        what = escape_control_characters(str(issue))
        screen.print(Text(f"\n{severity}: {issue.code}: ", STYLES[severity]) + what)
        if issue.hint:
            screen.print(f"  hint: {issue.hint}", soft_wrap=True)  # it may be a command to copy
    is_few = report.rows < FEW_ROWS and report.verdict != "errors"
    if is_few and report.format in ("chat", "instruction", "sharegpt", "prompt-completion"):
        screen.print(f"\nnote: {report.rows} rows are few; 100 to 500 are a start for a tone, more for a domain")
    more = f"; more: slimtune explain {DataError.code}" if report.verdict == "errors" else ""
    screen.print(Text(f"\n{report.format_verdict()}{more}", STYLES[report.verdict]))
