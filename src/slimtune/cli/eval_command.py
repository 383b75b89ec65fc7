"""`slimtune eval`: whether the tuned model is better than its base, at what price, and how sure that is.

`slimtune report` writes the page of a run again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .common import WARNING, Device, Json, NegativeResult, Run, console, error_console, show_progress, table
from .input_checks import require_rows, require_run

MODELS = ("base", "tuned")
MAX_MISTAKES = 8
"""Lines in place of a confusion table that is too wide; --json and the report have the whole table."""


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
    forgetting_budget: Annotated[float, Option(help="Nats a token that may be lost on it, at least 0.")] = 0.1,
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
    require_run(run)
    require_rows(data, run=run)
    from ..core.data.general_text import BUILT_IN_TEXT
    from ..evaluation.evaluate import EvalSettings, evaluate

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
    with show_progress():
        result = dict(evaluate(run, settings))
    if not as_json:
        _print_result(result)
    return result if result["verdict"]["passed"] else NegativeResult(result)


def report_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path | None, Option(help="File to write. Default: report.html in the run folder.")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write report.html of a run from the files in its folder.

    `slimtune train` and `slimtune eval` write it when they finish.
    """
    from ..core.training.run_dir import RunDir
    from ..evaluation.run_report import write_report

    file, damage = write_report(RunDir.open(run, require_adapter=False), out)
    for sentence in damage:
        error_console().print(f"warning: {sentence}", style=WARNING)
    if not as_json:
        console().print(str(file))
    return {"run": str(run), "report": str(file), "damage": damage}


def _print_result(result: Mapping[str, Any]) -> None:
    screen = console()
    if result["task"] in ("classification", "reward"):
        _print_classes(result)
        return

    def interval(figures: Mapping[str, Any], name: str) -> str:
        low, high = figures[f"{name}_ci95"]
        return f"{figures[name]:.4f} ({low:.4f} to {high:.4f})"

    def score(scores: Mapping[str, Any], model: str) -> str:
        error = scores[f"{model}_stderr"]
        return f"{scores[model]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [
        (m, f"{result[f'{m}_loss']:.4f}", f"{result[f'{m}_perplexity']:.2f}", f"{100 * result[f'{m}_accuracy']:.1f} %")
        for m in MODELS
    ]
    rows.append(("loss reduction", f"{result['loss_reduction']:.4f}", "", f"{100 * result['accuracy_gain']:.1f} %"))
    screen.print(table("", "loss (nats/token)", "perplexity", "token accuracy", rows=rows))
    low, high = result["loss_reduction_ci95"]
    screen.print(
        f"loss reduction in 95 % of bootstrap draws: {low:.4f} to {high:.4f}, over {result['rows']} rows, "
        f"{result['tokens']} supervised tokens"
    )
    if (preference := result.get("preference")) is not None:
        shown = [
            (m, *(f"{100 * preference[f'{m}_{key}']:.1f} %" for key in ("accuracy", "token_accuracy")),
             f"{preference[f'{m}_margin']:.3f}")
            for m in MODELS
        ]  # fmt: skip
        screen.print("\nthe losses are those of the chosen answers; how the model prefers them to the rejected ones:")
        screen.print(table("", "chosen preferred", "per token", "margin (nats/pair)", rows=shown))
        screen.print(
            f"margin gained in 95 % of bootstrap draws: {preference['margin_gain_ci95'][0]:.3f} to "
            f"{preference['margin_gain_ci95'][1]:.3f}; accuracy gained: {100 * preference['accuracy_gain']:.1f} % "
            f"({' to '.join(f'{100 * x:.1f}' for x in preference['accuracy_gain_ci95'])}), over {preference['pairs']} "
            f"pairs; the margin rose on {preference['pairs_better']}"
        )
        for name, part in preference["by_length"].items():
            if part["pairs"]:
                screen.print(
                    f"{name.replace('_', ' ')} ({part['pairs']} pair{'s' * (part['pairs'] != 1)}): base prefers it in "
                    f"{100 * part['base_accuracy']:.0f} %, tuned in {100 * part['tuned_accuracy']:.0f} %"
                )
    if (unpaired := result.get("unpaired_preference")) is not None:
        shown = [(m, *(f"{unpaired[f'{m}_{key}']:.3f}" for key in ("auc", "token_auc"))) for m in MODELS]
        screen.print(
            "\nthe losses are those of the good answers; how often a good answer is likelier than a bad one, over "
            f"{unpaired['good']} good and {unpaired['bad']} bad ones (AUC; chance is 0.5):"
        )
        screen.print(table("", "log p", "per token", rows=shown))
        screen.print(
            f"a good answer has a higher reward (log p tuned - log p base) than a bad one: "
            f"{interval(unpaired, 'reward_auc')}; mean rewards in nats: good {unpaired['good_reward']:.3f}, bad "
            f"{unpaired['bad_reward']:.3f}"
        )
    if (dependence := result["prompt_dependence"]) is not None:
        tuned = interval(dependence, "tuned")
        screen.print(
            "use of the prompt: after another row's prompt the loss of an answer is higher by "
            f"{dependence['base']:.4f} nats per token for the base, by {tuned} for the tuned model"
        )
    if (forgotten := result["forgetting"]) is not None:
        low, high = forgotten["change_ci95"]
        rose = forgotten["change"] > 0
        size, ends = abs(forgotten["change"]), (low, high) if rose else (-high, -low)
        words = "no more was forgotten than is allowed" if low > 0 else "nothing is shown to be forgotten"
        screen.print(
            f"general text: {words if forgotten['within'] else 'too much was forgotten'}; the loss on it "
            f"{'rose' if rose else 'fell'} by {size:.4f} ({ends[0]:.4f} to {ends[1]:.4f}) nats per token, where a rise "
            f"of {forgotten['budget']:g} is allowed"
        )
    if left_out := result.get("training_rows"):
        screen.print(f"{left_out} rows are also training rows, and were left out")
    if (different := result.get("different_rows", result["rows"])) < result["rows"]:
        screen.print(f"only {different} of the {result['rows']} rows differ from each other")
    for answer in result["generations"] or []:
        screen.print(f"\n{answer['prompt'][-1]['content']}", style="bold")
        for model in ("reference", *MODELS):
            screen.print(f"{model}: {answer[model].strip() or '(empty)'}")
    if summary := result["generation_summary"]:
        rows = [(name, *(f"{means[model]:.3g}" for model in MODELS)) for name, means in summary.items()]
        screen.print()
        screen.print(table(f"mean of {len(result['generations'])} answers", *MODELS, rows=rows))
    if (won := result.get("win_rate")) is not None:
        screen.print(f"\n{describe_win_rate(won)}")
    if result["tasks"]:
        rows = [
            (task, metric, *(score(scores, model) for model in MODELS))
            for task, metrics in result["tasks"].items()
            for metric, scores in metrics.items()
        ]
        screen.print()
        screen.print(table("task", "metric", *MODELS, rows=rows))
    screen.print(_describe_verdict(result["verdict"], "the tuned model is better"))


def _describe_verdict(verdict: Mapping[str, Any], better: str) -> str:
    """Return the last line: what is `better` if the verdict is passed, else the reasons why it is not."""
    if not verdict["passed"]:
        return f"verdict: no: {'; '.join(verdict['reasons'])}"
    return f"verdict: {better}" + (f", but {verdict['warning']}" if verdict["warning"] else "")


def describe_win_rate(won: Mapping[str, Any]) -> str:
    """Return how often the tuned model's answer won, and what the judge may have looked at instead."""
    counts = f"{won['wins']} wins, {won['ties']} ties, {won['losses']} losses, {won['unclear']} without a clear verdict"
    if won["win_rate"] is None:
        return f"judge: the win rate is not proven: {counts}"
    low, high = won["win_rate_ci95"]
    longer = (
        "" if won["longer_won"] is None else f"; the longer answer won {100 * won['longer_won']:.0f} % of the decided"
    )
    return (
        f"judge: the tuned model wins {100 * won['win_rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of "
        f"{won['prompts']} prompts: {counts}. Both orders got the same verdict on {100 * won['consistent']:.0f} %; "
        f"answers have {won['base_characters']:.0f} (base) and {won['tuned_characters']:.0f} (tuned) characters{longer}"
    )


def _print_classes(result: Mapping[str, Any]) -> None:
    """Print the result of a classifier or a reward model."""
    screen = console()

    def interval(name: str, percent: bool = False) -> str:
        low, high = result[f"{name}_ci95"]
        values = (result[name], low, high)
        first, *ends = [f"{100 * v:.1f} %" if percent else f"{v:.3f}" for v in values]
        return f"{first} ({ends[0]} to {ends[1]})"

    is_reward = result["task"] == "reward"
    baseline = "chance" if is_reward else f"always {result['baseline']!r}"
    rows = [("accuracy", interval("accuracy", percent=True)), (baseline, f"{100 * result['baseline_accuracy']:.1f} %")]
    rows.append(("margin", interval("margin")) if is_reward else ("macro-F1", interval("macro_f1")))
    rows.append(("loss", f"{result['loss']:.4f}"))
    screen.print(table(f"{result['rows']} {'pairs' if is_reward else 'rows'}", "(95 % interval)", rows=rows))
    if not is_reward:
        figures = [(c["name"], str(c["rows"]), *(f"{c[k]:.3f}" for k in ("precision", "recall", "f1")))
                   for c in result["classes"]]  # fmt: skip
        screen.print(table("class", "rows", "precision", "recall", "F1", rows=figures))
        if result["confusion"] is not None:
            _print_confusion([c["name"] for c in result["classes"]], result["confusion"])
    if left_out := result["training_rows"]:
        screen.print(f"{left_out} rows are also training rows, and were left out")
    screen.print(_describe_verdict(result["verdict"], "the model is better than its baseline"))


def _print_confusion(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> None:
    """Print the confusion table, or the most frequent mistakes if the table is too wide for the screen."""
    screen, heading = console(), "label ↓ prediction →"
    counts = [(name, *map(str, row)) for name, row in zip(names, confusion, strict=True)]
    if max(map(len, [heading, *names])) + sum(2 + max(len(n), 5) for n in names) <= screen.width:
        screen.print(table(heading, *names, rows=counts))
        return
    mistakes = [(n, a, b) for a, row in zip(names, confusion, strict=True)
                for b, n in zip(names, row, strict=True) if n and a != b]  # fmt: skip
    shown = [(a, b, str(n)) for n, a, b in sorted(mistakes, reverse=True)[:MAX_MISTAKES]]
    screen.print(table("most frequent mistakes: label", "prediction", "rows", left=[1], rows=shown))
