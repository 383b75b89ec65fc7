"""`slimtune eval`: is the tuned model better than its base, at what price, and how sure is that?"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, NegativeResult, Run, console, table


class Split(StrEnum):
    """The rows of the recipe to measure on."""

    test = "test"
    validation = "validation"


def eval_run(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on, in place of the recipe's split.")] = None,
    split: Annotated[Split, typer.Option(help="The recipe's rows to measure on.")] = Split.test,
    any_prompt: Annotated[
        bool, typer.Option("--any-prompt", help="Answers need not follow from their prompts.")
    ] = False,
    general: Annotated[
        str, typer.Option(help="General text for what is forgotten: a .txt or JSONL file, shipped, or none.")
    ] = "shipped",
    forgetting_budget: Annotated[float, typer.Option(help="Nats a token that may be lost on it, from 0.")] = 0.1,
    generate: Annotated[int, typer.Option(help="Held-out prompts that base and tuned answer, from 0.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens, from 1.")] = 128,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Of answers: exact, chrf, json, regex:PATTERN or json-schema:FILE. Repeatable."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="A folder of task files of your own.")] = None,
    as_json: Json = False,
) -> dict[str, Any] | NegativeResult:
    """Measure base against tuned on held-out rows; exit code 1 where tuned is not better, or forgot too much.

    Loss, perplexity and token accuracy, row by row in pairs, with bootstrap 95 % intervals; then answers and tasks.
    """
    from ..evaluation.evaluate import EvalSettings, evaluate
    from ..evaluation.forgetting import BUILT_IN_TEXT

    built_in = {"none": None, "shipped": BUILT_IN_TEXT}
    result = evaluate(
        run,
        EvalSettings(
            split=split.value,
            data=data,
            skip_prompt_test=any_prompt,
            general_text=built_in[general] if general in built_in else Path(general),
            forgetting_budget=forgetting_budget,
            generate=generate,
            max_new_tokens=max_new_tokens,
            checks=check or [],
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            tasks_path=tasks_path,
        ),
    )
    if not as_json:
        _show(result)
    return dict(result) if result["verdict"]["passed"] else NegativeResult(dict(result))


def _show(result: Mapping[str, Any]) -> None:
    rows = table("", "loss (nats/token)", "perplexity", "token accuracy")
    for who in ("base", "tuned"):
        loss, perplexity, accuracy = (result[f"{who}_{figure}"] for figure in ("loss", "perplexity", "accuracy"))
        rows.add_row(who, f"{loss:.4f}", f"{perplexity:.2f}", f"{100 * accuracy:.1f} %")
    rows.add_row("loss reduction", f"{result['loss_reduction']:.4f}", "", f"{100 * result['accuracy_gain']:.1f} %")
    screen = console()
    screen.print(rows)
    low, high = result["loss_reduction_ci95"]
    screen.print(
        f"loss reduction in 95 % of bootstrap draws: {low:.4f} to {high:.4f}, over {result['rows']} rows, "
        f"{result['tokens']} supervised tokens"
    )
    if (use := result["prompt_dependence"]) is not None:
        screen.print(
            f"prompt dependence: {use['base']:.4f} nats per token for the base, "
            f"{_spread(use, 'tuned')} for the tuned model"
        )
    if (forgot := result["forgetting"]) is not None:
        screen.print(
            f"forgotten on general text: {_spread(forgot, 'change')} nats per token, budget {forgot['budget']:g}"
        )
    for answer in result["generations"] or []:
        screen.print(f"\n{answer['prompt'][-1]['content']}", style="bold", markup=False)
        for who in ("reference", "base", "tuned"):
            screen.print(f"{who}: {answer[who]}", markup=False)
    if summary := result["generation_summary"]:
        means = table(f"mean of {len(result['generations'])} answers", "base", "tuned")
        for name, both in summary.items():
            means.add_row(name, f"{both['base']:.3g}", f"{both['tuned']:.3g}")
        screen.print()
        screen.print(means, markup=False)
    if result["tasks"]:
        scores = table("task", "metric", "base", "tuned")
        for task, metrics in result["tasks"].items():
            for metric, found in metrics.items():
                scores.add_row(task, metric, *(_with_error(found, who) for who in ("base", "tuned")))
        screen.print()
        screen.print(scores, markup=False)
    verdict = result["verdict"]
    said = "the tuned model is better" if verdict["passed"] else "no: " + "; ".join(verdict["reasons"])
    screen.print(f"verdict: {said}", markup=False)


def _spread(figures: Mapping[str, Any], name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.4f} ({low:.4f} to {high:.4f})"


def _with_error(found: Mapping[str, Any], who: str) -> str:
    error = found[f"{who}_stderr"]
    return f"{found[who]:.4f}" if error is None else f"{found[who]:.4f} ± {error:.4f}"
