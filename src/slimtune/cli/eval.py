"""`slimtune eval`: whether the tuned model is better than its base, at what price, and how sure that is."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, NegativeResult, Run, console, table


class Split(StrEnum):
    """Rows of the recipe to measure on."""

    test = "test"
    validation = "validation"


def eval_run(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on, in place of the recipe's split.")] = None,
    split: Annotated[Split, typer.Option(help="The recipe's rows to measure on.")] = Split.test,
    skip_prompt_test: Annotated[
        bool, typer.Option("--skip-prompt-test", help="Accept answers that do not depend on their prompts.")
    ] = False,
    general_text: Annotated[
        str, typer.Option(help="General text to measure forgetting on: a .txt or JSONL file, shipped, or none.")
    ] = "shipped",
    forgetting_budget: Annotated[float, typer.Option(help="Nats a token that may be lost on it, at least 0.")] = 0.1,
    generate: Annotated[int, typer.Option(help="Held-out prompts that base and tuned model answer.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Check of the answers: exact, chrf, json, regex:PATTERN or json-schema:FILE. Repeatable."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    as_json: Json = False,
) -> dict[str, Any] | NegativeResult:
    """Measure base and tuned model on held-out rows; exit code 1 if tuned is not better, or forgot too much.

    Loss, perplexity and token accuracy, paired by row, with bootstrap 95 % intervals; then answers and tasks.
    """
    from ..evaluation.evaluate import EvalSettings, evaluate
    from ..evaluation.forgetting import BUILT_IN_TEXT

    built_in = {"none": None, "shipped": BUILT_IN_TEXT}
    result = evaluate(
        run,
        EvalSettings(
            split=split.value,
            data=data,
            skip_prompt_test=skip_prompt_test,
            general_text=built_in[general_text] if general_text in built_in else Path(general_text),
            forgetting_budget=forgetting_budget,
            generate=generate,
            max_new_tokens=max_new_tokens,
            checks=check or [],
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            tasks_path=tasks_path,
        ),
    )
    if not as_json:
        _print_result(result)
    return dict(result) if result["verdict"]["passed"] else NegativeResult(dict(result))


def _print_result(result: Mapping[str, Any]) -> None:
    screen = console()
    rows = table("", "loss (nats/token)", "perplexity", "token accuracy")
    for model in ("base", "tuned"):
        loss, perplexity, accuracy = (result[f"{model}_{name}"] for name in ("loss", "perplexity", "accuracy"))
        rows.add_row(model, f"{loss:.4f}", f"{perplexity:.2f}", f"{100 * accuracy:.1f} %")
    rows.add_row("loss reduction", f"{result['loss_reduction']:.4f}", "", f"{100 * result['accuracy_gain']:.1f} %")
    screen.print(rows)
    low, high = result["loss_reduction_ci95"]
    screen.print(
        f"loss reduction in 95 % of bootstrap draws: {low:.4f} to {high:.4f}, over {result['rows']} rows, "
        f"{result['tokens']} supervised tokens"
    )
    if (dependence := result["prompt_dependence"]) is not None:
        screen.print(
            f"prompt dependence: {dependence['base']:.4f} nats per token for the base, "
            f"{_interval(dependence, 'tuned')} for the tuned model"
        )
    if (forgotten := result["forgetting"]) is not None:
        screen.print(
            f"forgotten on general text: {_interval(forgotten, 'change')} nats per token, "
            f"budget {forgotten['budget']:g}"
        )
    for answer in result["generations"] or []:
        screen.print(f"\n{answer['prompt'][-1]['content']}", style="bold")
        for model in ("reference", "base", "tuned"):
            screen.print(f"{model}: {answer[model]}")
    if summary := result["generation_summary"]:
        rows = table(f"mean of {len(result['generations'])} answers", "base", "tuned")
        for name, means in summary.items():
            rows.add_row(name, f"{means['base']:.3g}", f"{means['tuned']:.3g}")
        screen.print()
        screen.print(rows)
    if result["tasks"]:
        rows = table("task", "metric", "base", "tuned")
        for task, metrics in result["tasks"].items():
            for metric, scores in metrics.items():
                rows.add_row(task, metric, *(_score(scores, model) for model in ("base", "tuned")))
        screen.print()
        screen.print(rows)
    verdict = result["verdict"]
    text = "the tuned model is better" if verdict["passed"] else "no: " + "; ".join(verdict["reasons"])
    screen.print(f"verdict: {text}")


def _interval(figures: Mapping[str, Any], name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.4f} ({low:.4f} to {high:.4f})"


def _score(scores: Mapping[str, Any], model: str) -> str:
    error = scores[f"{model}_stderr"]
    return f"{scores[model]:.4f}" if error is None else f"{scores[model]:.4f} ± {error:.4f}"
