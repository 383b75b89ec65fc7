"""`slimtune data`: validate a data set before training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from .common import ColumnOption, Json, NegativeResult, console, error_console, parse_column_map, table

STYLES = {"error": "bold red", "errors": "bold red", "warning": "yellow", "warnings": "yellow", "ok": "bold green"}
BAR_WIDTH = 40


def data_report(
    file: Annotated[
        str, typer.Argument(metavar="DATA", help="A file or folder of rows, or a dataset's id.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="The base that will read the rows: an alias, a GGUF file, a folder or a Hub id.")
    ],
    validation: Annotated[str | None, typer.Option(help="Validation rows, which must not be among these.")] = None,
    max_seq_len: Annotated[int, typer.Option(help="Most tokens of a row, from 2.")] = 1024,
    on_overlong: Annotated[
        Literal["error", "drop", "truncate"],
        typer.Option("--on-overlong", "--too-long", help="What happens to a longer row."),
    ] = "drop",
    batch_size: Annotated[int, typer.Option(help="Rows per optimizer step, from 1; they are packed together.")] = 8,
    format: Annotated[
        str | None, typer.Option(help="Format of the rows (chat, instruction, text …), if their columns do not tell.")
    ] = None,
    column: ColumnOption = None,
    train_on: Annotated[
        Literal["assistant", "last_assistant"], typer.Option(help="The assistant's turns that are learned.")
    ] = "assistant",
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file instead of the base's template.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Validate a data set before training.

    Shows lengths, supervised tokens, and invalid, repeated or broken rows. Exit code 1 if they would spoil a run.
    """
    from ..data.validation.report import validate_file
    from ..models.loader import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, chat_template=chat_template)
    report = validate_file(
        file,
        tokenizer,
        model=model,
        format=format,
        columns={path.removeprefix("data.columns."): name for path, name in parse_column_map(column).items()},
        max_seq_len=max_seq_len,
        on_overlong=on_overlong,
        train_on=train_on,
        rows_per_step=batch_size,
        validation=validation,
    )
    if html is not None:
        from ..reporting.report import render_data_report
        from ..run_dir import write_atomic

        write_atomic(html, render_data_report(report))
        error_console().print(f"page: {html}", markup=False)
    if not as_json:
        print_report(report)
    passed = report["verdict"] == "ok" or (report["verdict"] == "warnings" and not strict)
    return report if passed else NegativeResult(report)


def print_report(report: Mapping[str, Any]) -> None:
    """Print a report for people. Supervised text is colored, or between ⟦ and ⟧ where there are no colors."""
    from ..data.validation.summary import format_issue, format_verdict, report_facts

    screen = console()
    screen.print(f"{report['file']}: {report['format']} rows for {report['model']}", markup=False)
    for sample in report["samples"]:
        screen.print(Text(f"\nline {sample['line']}, as the model reads it; supervised text is marked", "dim"))
        text = Text()
        for piece in sample["pieces"]:
            marked = piece["supervised"] and not screen.is_terminal
            text.append(f"⟦{piece['text']}⟧" if marked else piece["text"], "green underline" * piece["supervised"])
        screen.print(text)
    rows = table("", "")
    rows.columns[1].justify, rows.columns[1].no_wrap = "left", False
    for name, value in report_facts(report):
        rows.add_row(name, value)
    screen.print()
    screen.print(rows)
    histogram = report["lengths"]["histogram"]
    most = max((bar["rows"] for bar in histogram), default=0)
    for bar in histogram:
        lengths = f"{bar['from']}–{bar['to']}"
        screen.print(f"{lengths:>11} {'█' * -(-BAR_WIDTH * bar['rows'] // most)} {bar['rows'] or ''}", markup=False)
    for issue in report["issues"]:
        severity = issue["severity"]
        screen.print(Text(f"\n{severity}: {issue['code']}: ", STYLES[severity]) + format_issue(issue))
        screen.print(f"  hint: {issue['hint']}", markup=False)
    screen.print(Text(f"\n{format_verdict(report)}", STYLES[report["verdict"]]))
