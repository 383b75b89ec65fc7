"""Held-out loss, perplexity and token accuracy, base against tuned; and what else says whether tuned is better.

Every row is scored twice by one model in one arrangement of rows, with the adapter and without it, so that nothing
but the adapter makes the difference. What the numbers are stands in statistics.py, prompts.py and forgetting.py, what
they have to be in verdict.py.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.collator import Example
from ..errors import AdapterError, ModelError, SlimtuneError, UsageError, format_names
from ..reporting import write_report
from ..run_dir import RunDir, to_json, write_atomic
from ..setup import build_collator, find_adapter_folder, load_run, open_rows_from_recipe
from ..train_step.loss import RowScore, evaluate_rows
from .answer_checks import build_checks
from .answers import sample_prompts, side_by_side, summary
from .eval_rows import held_out_rows, measured_on, recipe_for
from .forgetting import BUDGET, WINDOW, examples_of, measure_forgetting, read_pieces
from .generate import Generator
from .lm_eval import require_tasks, run_tasks
from .prompt_dependence import prompt_dependence, shuffle_prompts
from .statistics import Estimate, paired_bootstrap, perplexity
from .verdict import against, make_verdict


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    any_prompt: bool = False,
    general: Path | None = None,
    budget: float = BUDGET,
    generate: int = 0,
    max_new_tokens: int = 128,
    checks: Sequence[str] = (),
    tasks: Sequence[str] = (),
    tasks_path: Path | None = None,
) -> dict[str, Any]:
    """Measure base against tuned; a run folder keeps the result as `eval-<split>.json`, whatever the verdict.

    Beside it lies `scores-<split>.json`: of each row its `line` in the file, `tokens` (supervised), and the nats
    that `base` and `tuned` spend on them.

    Args:
        run: a run folder, or an adapter folder (then `data` is needed).
        split: the recipe's rows to measure on: "test" or "validation".
        data: rows to measure on, in place of a split; kept as `eval-data-<name>.json`.
        bootstrap: draws for the intervals.
        seed: of the draws, and of which prompts are exchanged.
        any_prompt: answers need not follow from their prompts.
        general: text that the adapter never saw, .txt or JSONL (`forgetting.SHIPPED`); None: none measured.
        budget: nats per token that may be lost on it, from 0.
        generate: how many held-out prompts base and tuned answer.
        max_new_tokens: longest answer in tokens (≥ 1).
        checks: of answers, beside length, repetition and end; as checks.py names them.
        tasks: of lm-evaluation-harness.
        tasks_path: a folder of task files of one's own.

    Returns:
        What docs/eval.md lists; losses in nats per supervised token.

    Raises:
        UsageError: no such run, rows, text, check or task, a number out of its range, or a prompt that leaves no room.
        DataError: the rows or the text are faulty.
        AdapterError: the adapter does not fit, or gives losses that are no numbers.
        ModelError: the base cannot be loaded, a package is missing, or the harness fails.
    """
    began = time.perf_counter()
    run = Path(run)
    _require_ranges(bootstrap, budget, generate, max_new_tokens)
    checking = build_checks(checks)
    manager = require_tasks(tasks, tasks_path) if tasks else None
    folder = None if find_adapter_folder(run) == run else RunDir.open(run)
    path = measured_on(folder, run, split, data)
    if path is not None:
        # A fault of the file is said before the model is loaded.
        deque(open_rows_from_recipe(folder.load_recipe() if folder else None, path).rows(), maxlen=0)
    pieces = [] if general is None else read_pieces(general)
    loaded = load_run(run)
    recipe, tokenizer = recipe_for(loaded, run, path), loaded.base.tokenizer
    examples, report = held_out_rows(recipe, loaded, path)
    asked, speaker = [], None
    if generate:
        speaker = Generator(loaded)
        asked = sample_prompts(open_rows_from_recipe(recipe, path or recipe.data.train).rows(), examples, generate)
        for one in asked:
            speaker.prompt(one.prompt, max_new_tokens)  # one without room is said before anything is scored
    context = getattr(loaded.base.model.config.get_text_config(), "max_position_embeddings", None) or 4 * WINDOW
    texts = examples_of(pieces, general, tokenizer, min(context // 2, 2 * WINDOW)) if general is not None else []
    longest = max(int(examples.lengths.max()), *(len(e["input_ids"]) for e in texts), 0)
    collator = build_collator(recipe, loaded.model, tokenizer, longest)

    def judge(rows: Sequence[Example]) -> tuple[list[RowScore], list[RowScore]]:
        tuned = evaluate_rows(loaded.model, rows, collator)
        with loaded.model.disable_adapter():
            return evaluate_rows(loaded.model, rows, collator), tuned

    base, tuned = judge(examples)
    _require_numbers(base, examples, path, ModelError, "base")
    _require_numbers(tuned, examples, path, AdapterError, "tuned model")
    tokens, draws = [j.tokens for j in base], {"draws": bootstrap, "seed": seed}
    loss = paired_bootstrap([j.nats for j in base], [j.nats for j in tuned], tokens, **draws)
    hits = paired_bootstrap([j.hits for j in tuned], [j.hits for j in base], tokens, **draws)  # more is better
    result: dict[str, Any] = {
        "run": str(run),
        "split": None if data is not None else split,
        "data": str(path or recipe.data.train),
        "rows": len(examples),
        "tokens": sum(tokens),
        **_figures("loss", loss.base, loss.tuned),
        "loss_reduction": loss.difference.value,
        "loss_reduction_ci95": loss.difference.interval,
        **_figures("perplexity", _exponential(loss.base), _exponential(loss.tuned)),
        **_figures("accuracy", hits.tuned, hits.base),
        "accuracy_gain": hits.difference.value,
        "accuracy_gain_ci95": hits.difference.interval,
        "rows_better": loss.rows_better,
        "prompt_dependence": None
        if any_prompt
        else prompt_dependence(shuffle_prompts(examples, seed), base, tuned, judge, **draws),
    }
    result["improved"] = not against(result)
    result["forgetting"] = None
    if general is not None:
        result["forgetting"] = {"text": str(general), **measure_forgetting(texts, judge, budget, **draws)}
    result |= {
        "generations": None,
        "generation_summary": None,
        "tasks": None,
        "verdict": make_verdict(result),
        "dropped": report.dropped,
        "truncated": report.truncated,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "quantization": loaded.base.quantization,
    }
    each = [
        {"line": e["line"], "tokens": b.tokens, "base": b.nats, "tuned": u.nats}
        for e, b, u in zip(examples, base, tuned, strict=True)
    ]

    def keep() -> None:
        result["seconds"] = round(time.perf_counter() - began, 3)
        if folder is not None:
            name = split if data is None else f"data-{data.stem}"
            write_atomic(folder.evaluation_file(name), to_json(result, indent=2) + "\n")
            write_atomic(folder.scores_file(name), to_json(each) + "\n")
            write_report(folder)

    keep()  # what is measured by now stays, should answers or tasks fail
    if speaker is not None:
        result["generations"] = side_by_side(speaker, asked, checking, max_new_tokens)
        result["generation_summary"] = summary(result["generations"])
        keep()
    if tasks:
        result["tasks"] = run_tasks(loaded, tasks, manager)
        keep()
    return result


def _figures(name: str, base: Estimate, tuned: Estimate) -> dict[str, Any]:
    both = {f"base_{name}": base, f"tuned_{name}": tuned}
    return {k: e.value for k, e in both.items()} | {f"{k}_ci95": e.interval for k, e in both.items()}


def _exponential(loss: Estimate) -> Estimate:
    return Estimate(*map(perplexity, (loss.value, loss.low, loss.high)))


def _require_ranges(bootstrap: int, budget: float, generate: int, max_new_tokens: int) -> None:
    if bootstrap < 1:
        raise UsageError(f"bootstrap is {bootstrap}", "one draw or more", "leave it out for 2000")
    if not 0 <= budget < math.inf:
        raise UsageError(f"the forgetting budget is {budget}", "nats per token, from 0", f"leave it out for {BUDGET}")
    if generate < 0:
        raise UsageError(f"generate is {generate}", "how many prompts are answered, from 0", "leave it out for 0")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", "1 or more", "leave it out for 128")


def _require_numbers(
    scores: Sequence[RowScore], examples: Sequence[Example], path: Path | None, kind: type[SlimtuneError], who: str
) -> None:
    lines = [e["line"] for e, j in zip(examples, scores, strict=True) if not math.isfinite(j.nats)]
    if lines:
        raise kind(
            f"the {who}'s loss is no number on {len(lines)} of {len(scores)} rows "
            f"(lines {format_names(lines)} of {path or 'the training file'})",
            "finite losses",
            "evaluate in float32, or take an older checkpoint",
        )
