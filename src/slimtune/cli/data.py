"""`slimtune data`: one report on a file of rows before any training."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .common import ColumnOption, Json, NegativeResult, console, error_console, parse_column_map, table

COLOURS = {"fault": "bold red", "warning": "yellow", "faulty": "bold red", "warnings": "yellow", "sound": "bold green"}
_BAR = 40


class TooLong(StrEnum):
    """What happens to a longer row."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class TrainOn(StrEnum):
    """The assistant's turns that are learned."""

    assistant = "assistant"
    last_assistant = "last_assistant"


def data_report(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder of rows.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The base that will read them: an alias, a GGUF file, a folder or a Hub id.")
    ],
    validation: Annotated[str | None, typer.Option(help="Validation rows, which must not be among these.")] = None,
    max_seq_len: Annotated[int, typer.Option(help="Longest row in tokens, from 2.")] = 1024,
    on_overlong: Annotated[TooLong, typer.Option(help="What happens to a longer row.")] = TooLong.drop,
    batch_size: Annotated[int, typer.Option(help="Rows that a step lays together, from 1.")] = 8,
    format: Annotated[
        str | None, typer.Option(help="What a row is (chat, instruction, text …), where its columns do not say.")
    ] = None,
    column: ColumnOption = None,
    train_on: Annotated[TrainOn, typer.Option(help="The assistant's turns that are learned.")] = TrainOn.assistant,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file, in place of the base's template.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page there.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are faults.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base run code of its own.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Report on rows before any training.

    Lengths, what is learned, what is refused, doubled or broken. Exit code 1 where training would be spoiled.
    """
    from ..data.validation.validate_file import validate_file
    from ..models.loader import load_tokenizer
    from ..run_dir import write_atomic

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, chat_template=chat_template)
    report = validate_file(
        file,
        tokenizer,
        model=model,
        format=format,
        columns={path.removeprefix("data.columns."): column for path, column in parse_column_map(column).items()},
        train_on=train_on.value,
        max_seq_len=max_seq_len,
        on_overlong=on_overlong.value,
        rows_a_step=batch_size,
        validation=validation,
    )
    if html is not None:
        from ..data.validation.html_report import render_html

        write_atomic(html, render_html(report))
        error_console().print(f"page: {html}", markup=False)
    if not as_json:
        show(report)
    good = report["verdict"] == "sound" or (report["verdict"] == "warnings" and not strict)
    return report if good else NegativeResult(report)


def _piece(piece: Mapping[str, Any], coloured: bool) -> tuple[str, str]:
    text = piece["text"]
    return (text if coloured or not piece["learned"] else f"⟦{text}⟧", "green underline" if piece["learned"] else "")


def show(report: Mapping[str, Any]) -> None:
    """Print a report."""
    from ..data.validation.summary import format_issue, format_verdict, report_facts

    screen = console()
    screen.print(f"{report['file']}: {report['format']} rows for {report['model']}", markup=False)
    for sample in report["samples"]:
        screen.print(Text(f"\nline {sample['line']}, as the model reads it; what is marked is learned", "dim"))
        screen.print(Text.assemble(*(_piece(p, screen.is_terminal) for p in sample["pieces"])))
    rows = table("", "")
    rows.columns[1].justify, rows.columns[1].no_wrap = "left", False
    for name, value in report_facts(report):
        rows.add_row(name, value)
    screen.print()
    screen.print(rows)
    most = max((bar["rows"] for bar in report["lengths"]["histogram"]), default=0)
    for bar in report["lengths"]["histogram"]:
        span = f"{bar['from']}–{bar['to']}"
        screen.print(f"{span:>11} {'█' * -(-_BAR * bar['rows'] // most)} {bar['rows'] or ''}", markup=False)
    for found in report["findings"]:
        screen.print(
            Text(f"\n{found['severity']}: {found['code']}: ", COLOURS[found["severity"]]) + format_issue(found)
        )
        screen.print(f"  hint: {found['fix']}", markup=False)
    screen.print(Text(f"\n{format_verdict(report)}", COLOURS[report["verdict"]]))
