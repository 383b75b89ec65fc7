"""Compare the tuned model with its base: held-out loss, perplexity and accuracy with intervals, and a verdict.

The same model in the same arrangement of rows scores every row twice, with the adapter and without it, so nothing but
the adapter makes the difference.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..data.collator import Example
from ..data.tokenize import RowReport
from ..data.tokenized_dataset import TokenizedDataset
from ..errors import AdapterError, ModelError, SlimtuneError, UsageError, format_names, nearest
from ..reporting import write_report
from ..run_dir import RunDir, write_json
from ..setup import (
    TrainedModel,
    build_collator,
    find_adapter_folder,
    load_datasets,
    load_eval_dataset,
    load_run,
    open_rows_from_recipe,
)
from ..train_step.loss import RowScore, evaluate_rows
from .answers import build_checks, generate_answers, sample_prompts, summarize_checks
from .forgetting import DEFAULT_BUDGET, WINDOW, measure_forgetting, read_general_text, tokenize_general_text
from .generate import Generator
from .lm_eval import find_tasks, run_tasks
from .prompt_dependence import prompt_dependence, shuffle_prompts
from .statistics import Estimate, paired_bootstrap, perplexity
from .verdict import list_failures, make_verdict

SPLITS = ("test", "validation")


@dataclass(frozen=True)
class EvalSettings:
    """What to measure.

    Args:
        split: rows of the recipe to measure on: "test" or "validation".
        data: a file of rows to measure on instead of a split.
        bootstrap: draws for the intervals, 1 or more.
        seed: of the draws and of the shuffled prompts.
        skip_prompt_test: do not test whether answers depend on their prompts.
        general_text: text the adapter never saw, `.txt` or JSONL (`forgetting.BUILT_IN_TEXT`); None: not measured.
        forgetting_budget: nats per token that may be lost on the general text, 0 or more.
        generate: number of held-out prompts that base and tuned model answer, 0 or more.
        max_new_tokens: longest answer in tokens, 1 or more.
        checks: of the answers, by the names in `answers.py`.
        tasks: names of lm-evaluation-harness tasks.
        tasks_path: a folder of the user's task files.

    Raises:
        UsageError: a number is out of its range.
    """

    split: str = "test"
    data: Path | None = None
    bootstrap: int = 2000
    seed: int = 0
    skip_prompt_test: bool = False
    general_text: Path | None = None
    forgetting_budget: float = DEFAULT_BUDGET
    generate: int = 0
    max_new_tokens: int = 128
    checks: Sequence[str] = ()
    tasks: Sequence[str] = ()
    tasks_path: Path | None = None

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[bool, str]] = {
            "bootstrap": (self.bootstrap >= 1, "one draw or more"),
            "forgetting_budget": (0 <= self.forgetting_budget < math.inf, "nats per token, 0 or more"),
            "generate": (self.generate >= 0, "a number of prompts, 0 or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise UsageError(f"{name} is {getattr(self, name)}", expected)


def evaluate(run: Path, settings: EvalSettings | None = None) -> dict[str, Any]:
    """Compare base and tuned model and return what `slimtune eval --json` prints (docs/eval.md lists the fields).

    A run folder keeps the result as `eval-<split>.json` (`eval-data-<name>.json` for a file) whatever the verdict, and
    beside it `scores-<split>.json`: for each row its `line`, its supervised `tokens`, and the loss in nats of `base`
    and `tuned`. Losses are in nats per supervised token.

    Args:
        run: a run folder, or an adapter folder (then `data` is required).
        settings: what to measure.

    Raises:
        UsageError: the run, rows, text, check or task does not exist, or a prompt leaves no room for an answer.
        DataError: the rows or the text are faulty.
        AdapterError: the adapter does not fit, or its loss is NaN or Inf.
        ModelError: the base cannot be loaded, a package is missing, or the harness fails.
    """
    start = time.perf_counter()
    run, settings = Path(run), settings or EvalSettings()
    checks = build_checks(settings.checks)
    task_manager = find_tasks(settings.tasks, settings.tasks_path) if settings.tasks else None
    run_dir = None if find_adapter_folder(run) == run else RunDir.open(run)
    file = _find_eval_file(run_dir, run, settings)
    if file is not None:  # report faulty rows before the model is loaded
        deque(open_rows_from_recipe(run_dir.load_recipe() if run_dir else None, file).valid_rows(), maxlen=0)
    pieces = [] if settings.general_text is None else read_general_text(settings.general_text)

    trained = load_run(run)
    model: Any = trained.model
    tokenizer = trained.base.tokenizer
    recipe = trained.recipe or Recipe.from_dict(
        {
            "model": trained.base.source.spec,
            "data": {"train": str(file)},
            "train": {"packing": False},  # without a recipe the architecture may be any
            "output_dir": str(run),
        }
    )
    examples, row_report = _load_eval_rows(recipe, trained, file)
    prompts, generator = [], None
    if settings.generate:
        generator = Generator(trained)
        rows = open_rows_from_recipe(recipe, file or recipe.data.train).valid_rows()
        prompts = sample_prompts(rows, examples, settings.generate)
        for prompt in prompts:  # check that each has room for an answer before anything is scored
            generator.tokenize_prompt(prompt.messages, settings.max_new_tokens)
    general: list[Example] = []
    if settings.general_text is not None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4 * WINDOW
        general = tokenize_general_text(pieces, settings.general_text, tokenizer, min(context // 2, 2 * WINDOW))
    longest = max(int(examples.lengths.max()), *(len(e["input_ids"]) for e in general), 0)
    collator = build_collator(recipe, model, tokenizer, longest)

    def score_both(rows: Sequence[Example]) -> tuple[list[RowScore], list[RowScore]]:
        tuned = evaluate_rows(model, rows, collator)
        with model.disable_adapter():
            return evaluate_rows(model, rows, collator), tuned

    base, tuned = score_both(examples)
    _check_finite(base, examples, file, ModelError, "base")
    _check_finite(tuned, examples, file, AdapterError, "tuned model")
    tokens = [score.tokens for score in base]
    draws = {"draws": settings.bootstrap, "seed": settings.seed}
    loss = paired_bootstrap([s.nats for s in base], [s.nats for s in tuned], tokens, **draws)
    hits = paired_bootstrap([s.hits for s in tuned], [s.hits for s in base], tokens, **draws)  # more is better
    result: dict[str, Any] = {
        "run": str(run),
        "split": None if settings.data is not None else settings.split,
        "data": str(file or recipe.data.train),
        "rows": len(examples),
        "tokens": sum(tokens),
        **_format_pair("loss", loss.base, loss.tuned),
        "loss_reduction": loss.difference.value,
        "loss_reduction_ci95": loss.difference.interval,
        **_format_pair("perplexity", *(Estimate(*map(perplexity, e)) for e in (loss.base, loss.tuned))),
        **_format_pair("accuracy", hits.tuned, hits.base),
        "accuracy_gain": hits.difference.value,
        "accuracy_gain_ci95": hits.difference.interval,
        "rows_better": loss.rows_better,
        "prompt_dependence": None
        if settings.skip_prompt_test
        else prompt_dependence(shuffle_prompts(examples, settings.seed), base, tuned, score_both, **draws),
        "forgetting": None
        if settings.general_text is None
        else {
            "text": str(settings.general_text),
            **measure_forgetting(general, score_both, settings.forgetting_budget, **draws),
        },
    }
    result |= {
        "improved": not list_failures(result),
        "generations": None,
        "generation_summary": None,
        "tasks": None,
        "verdict": make_verdict(result),
        "dropped": row_report.dropped,
        "truncated": row_report.truncated,
        "dtype": str(trained.base.dtype).removeprefix("torch."),
        "quantization": trained.base.quantization,
    }
    scores = [
        {"line": example["line"], "tokens": b.tokens, "base": b.nats, "tuned": t.nats}
        for example, b, t in zip(examples, base, tuned, strict=True)
    ]

    def save() -> None:
        result["seconds"] = round(time.perf_counter() - start, 3)
        if run_dir is not None:
            name = settings.split if settings.data is None else f"data-{settings.data.stem}"
            write_json(run_dir.evaluation_file(name), result)
            write_json(run_dir.scores_file(name), scores, indent=None)
            write_report(run_dir)

    save()  # the figures stay if generation or a task fails
    if generator is not None:
        result["generations"] = generate_answers(generator, prompts, checks, settings.max_new_tokens)
        result["generation_summary"] = summarize_checks(result["generations"])
        save()
    if settings.tasks:
        result["tasks"] = run_tasks(trained, settings.tasks, task_manager)
        save()
    return result


def _find_eval_file(run_dir: RunDir | None, run: Path, settings: EvalSettings) -> Path | None:
    """Return the file to measure on, or None for the rows that training set aside from its own file.

    Raises:
        UsageError: the split is unknown, or the run names no rows for it.
    """
    split = settings.split
    if settings.data is not None:
        return Path(settings.data)
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}{nearest(split, SPLITS)}", f"one of {format_names(SPLITS)}")
    if run_dir is None:
        raise UsageError(
            f"{run} is an adapter folder without a recipe, so its held-out rows are unknown",
            "rows the adapter was not trained on",
            "--data FILE",
        )
    data = run_dir.load_recipe().data
    file = data.test if split == "test" else data.validation
    has_validation = data.validation is not None or data.validation_fraction > 0
    if file is None and not (split == "validation" and has_validation):
        raise UsageError(
            f"the recipe of {run} names no {split} rows",
            f"data.{split} in {run_dir.recipe_file}, or a file",
            f"--data FILE{', or --split validation' if split == 'test' and has_validation else ''}",
        )
    return file


def _load_eval_rows(recipe: Recipe, trained: TrainedModel, file: Path | None) -> tuple[TokenizedDataset, RowReport]:
    if file is not None:
        return load_eval_dataset(recipe, trained.base.tokenizer, file)
    datasets = load_datasets(recipe, trained.base.tokenizer)
    if not datasets.validation:
        raise UsageError(
            f"training set no rows aside: {recipe.data.validation_fraction} of {len(datasets.train)} rows is none",
            "data.validation in the recipe, or a file",
            "--data FILE",
        )
    return datasets.validation, datasets.train_report


def _check_finite(
    scores: Sequence[RowScore], examples: Sequence[Example], file: Path | None, error: type[SlimtuneError], who: str
) -> None:
    lines = [e["line"] for e, score in zip(examples, scores, strict=True) if not math.isfinite(score.nats)]
    if lines:
        raise error(
            f"the loss of the {who} is NaN or Inf on {len(lines)} of {len(scores)} rows "
            f"(lines {format_names(lines)} of {file or 'the training file'})",
            "finite losses",
            "evaluate in float32, or take an older checkpoint",
        )


def _format_pair(name: str, base: Estimate, tuned: Estimate) -> dict[str, Any]:
    both = {f"base_{name}": base, f"tuned_{name}": tuned}
    return {k: e.value for k, e in both.items()} | {f"{k}_ci95": e.interval for k, e in both.items()}
