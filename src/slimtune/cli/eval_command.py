"""`slimtune eval`: whether the tuned model is better than its base, at what price, and how sure that is.

`slimtune report` writes the page of a run again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from .common import (
    WARNING,
    Device,
    Json,
    NegativeVerdictResult,
    Run,
    make_console,
    make_error_console,
    make_table,
    showing_progress,
)
from .input_checks import require_row_files_exist, require_run_and_base_exist

if TYPE_CHECKING:  # its types take as long as the rest of the command line
    from ..evaluation.result_lines import ResultLine


@dataclass(frozen=True)
class RunReportResult:
    """What `report --json` prints."""

    run: str
    """The run folder."""
    report: str
    """The page that was written."""
    damage: list[str]
    """What is damaged in the run's files, one sentence each."""


def eval_run(
    run: Run,
    data: Annotated[Path | None, Option(help="Rows to measure on, in place of the recipe's split.")] = None,
    split: Annotated[Literal["test", "validation"], Option(help="The recipe's rows to measure on.")] = "test",
    skip_prompt_test: Annotated[
        bool, Option("--skip-prompt-test", help="Accept answers that do not depend on their prompts.")
    ] = False,
    general_text: Annotated[
        str,
        Option(help="Text to measure forgetting on: a .txt or JSONL file, shipped (with slimtune), or none."),
    ] = "shipped",
    forgetting_budget: Annotated[float, Option(min=0, help="Nats a token that may be lost on it.")] = 0.1,
    generate: Annotated[int, Option(help="Held-out prompts that base and tuned model answer.")] = 0,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 128,
    check: Annotated[
        list[str] | None,
        Option(help="Check of the answers: exact, chrf, json, regex:PATTERN or json-schema:FILE. Repeatable."),
    ] = None,
    judge: Annotated[
        str | None, Option(help="Compares the answers of both models: FILE.py:FUNCTION, or http://…/v1 (OpenAI's API).")
    ] = None,
    tasks: Annotated[str | None, Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    tasks_path: Annotated[Path | None, Option(help="A folder with task files of your own.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> Any:
    """Measure base and tuned model on held-out rows; exit code 1 if tuned is not better, or forgot too much.

    Loss, perplexity and token accuracy, paired by row, with bootstrap 95 % intervals; then answers and tasks.
    """
    require_run_and_base_exist(run)
    require_row_files_exist(data, run_giving_format=run)
    from ..evaluation.evaluate import EvalSettings, evaluate
    from ..evaluation.general_text import BUILT_IN_TEXT

    built_in = {"none": None, "shipped": BUILT_IN_TEXT}
    settings = EvalSettings(
        split=split,
        data=data,
        skip_prompt_test=skip_prompt_test,
        general_text=built_in[general_text] if general_text in built_in else Path(general_text),
        forgetting_budget=forgetting_budget,
        generate=generate,
        max_new_tokens=max_new_tokens,
        checks=check or [],
        judge=judge,
        tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
        tasks_path=tasks_path,
        device=device,
    )
    with showing_progress():
        result = evaluate(run, settings)
    if not as_json:
        from ..evaluation.result_lines import list_eval_result_lines

        screen = make_console()
        _print_lines(list_eval_result_lines(result, screen.width))
        for step in result.verdict.next_steps:
            screen.print(f"next, to {step.why}:\n  {step.command}", soft_wrap=True)
    return result if result.verdict.passed else NegativeVerdictResult(result)


def report_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path | None, Option(help="File to write. Default: report.html in the run folder.")] = None,
    as_json: Json = False,
) -> RunReportResult:
    """Write report.html of a run from the files in its folder.

    `slimtune train` and `slimtune eval` write it when they finish.
    """
    from ..core.training.run_dir import RunDir
    from ..evaluation.run_report import write_run_report_and_list_damage

    file, damage = write_run_report_and_list_damage(RunDir.open(run, require_adapter=False), out)
    for sentence in damage:
        make_error_console().print(f"warning: {sentence}", style=WARNING)
    if not as_json:
        make_console().print(str(file))
    return RunReportResult(run=str(run), report=str(file), damage=damage)


def _print_lines(lines: "Iterable[ResultLine]") -> None:
    from ..evaluation.result_lines import ResultHeading

    screen = make_console()
    for line in lines:
        if isinstance(line, str):
            screen.print(line)
        elif isinstance(line, ResultHeading):
            screen.print(line.text, style="bold")
        else:
            screen.print(make_table(*line.columns, text_column_indices=line.text_columns, rows=line.rows))
