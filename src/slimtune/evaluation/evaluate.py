"""Compare the tuned model with its base: held-out loss, perplexity and accuracy with intervals, and a verdict.

The same model in the same arrangement of rows scores every row twice, with the adapter and without it, so nothing but
the adapter makes the difference. The tuned model is improved if the whole interval of its loss reduction is above 0 and
its answers still depend on their prompts. It passes if it also forgot no more than its budget.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe
from ..data.collator import Example
from ..data.dataset import Row
from ..data.formats import split_pair
from ..data.tokenized_dataset import FirstRows, TokenizedDataset
from ..errors import AdapterError, DataError, ModelError, SlimtuneError, UsageError, format_names, nearest
from ..reporting import write_report
from ..run_dir import RunDir, find_adapter_folder
from ..setup import (
    Datasets,
    build_collator,
    load_datasets,
    load_eval_dataset,
    load_run,
    open_rows_from_recipe,
)
from ..train_step.loss import RowScore, evaluate_rows, score_row_logps
from ..utils.files import require_output_file, write_json
from .answers import build_check, generate_base_and_tuned_answers, sample_prompts, summarize_checks
from .classify import evaluate_classifier, evaluate_reward_model, list_reasons_not_better
from .forgetting import DEFAULT_BUDGET, WINDOW, measure_forgetting, read_general_text, tokenize_general_text
from .generate import Generator
from .lm_eval import find_tasks, run_tasks
from .preference import list_reasons_not_preferred, measure_preferences
from .prompt_dependence import MIN_DEPENDENCE, prompt_dependence, shuffle_prompts
from .statistics import Estimate, paired_bootstrap, perplexity

SPLITS = ("test", "validation")
MIN_ROWS = 6
"""Fewer rows cannot show anything at 95 %: five rows all improve by chance in 1 of 32 cases."""


@dataclass(frozen=True)
class EvalSettings:
    """What to measure.

    Raises:
        UsageError: a number is out of its range.
    """

    split: str = "test"  # rows of the recipe to measure on: "test" or "validation"
    data: Path | None = None  # a file of rows to measure on instead of a split
    bootstrap: int = 2000  # draws for the intervals, 1 or more
    seed: int = 0  # of the draws and of the shuffled prompts
    skip_prompt_test: bool = False  # do not test whether answers depend on their prompts
    general_text: Path | None = None  # that the adapter never saw, .txt or JSONL (`forgetting.BUILT_IN_TEXT`)
    forgetting_budget: float = DEFAULT_BUDGET  # nats per token that may be lost on it, 0 or more
    generate: int = 0  # held-out prompts that base and tuned model answer, 0 or more
    max_new_tokens: int = 128  # longest answer in tokens, 1 or more
    checks: Sequence[str] = ()  # of the answers, by the names in `answers.py`
    tasks: Sequence[str] = ()  # of lm-evaluation-harness
    tasks_path: Path | None = None  # a folder of the user's task files
    device: str | None = None  # to run on; None: the run's

    def __post_init__(self) -> None:
        for name, least in (("bootstrap", 1), ("forgetting_budget", 0), ("generate", 0), ("max_new_tokens", 1)):
            if not least <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}", f"{least} or more")


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
    checks = {name: build_check(name) for name in settings.checks}
    task_manager = find_tasks(settings.tasks, settings.tasks_path) if settings.tasks else None
    run_dir = None if find_adapter_folder(run) == run else RunDir.open(run)
    if run_dir is not None:
        require_output_file(run_dir.report_file)
    file = _find_eval_file(run_dir, run, settings)
    if file is not None:  # report faulty rows before the model is loaded
        deque(open_rows_from_recipe(run_dir.load_recipe() if run_dir else None, file).require_valid_rows(), maxlen=0)
    pieces = [] if settings.general_text is None else read_general_text(settings.general_text)

    trained = load_run(run, device=settings.device)
    model: Any = trained.model
    tokenizer = trained.base.tokenizer
    recipe = trained.recipe
    if recipe is None:  # then the architecture may be any, so rows are not packed
        sections = {"data": {"train": str(file)}, "train": {"packing": False}, "output_dir": str(run)}
        if trained.classes is not None:
            sections["task"] = {"name": "classification" if trained.classes.names else "reward"}
        recipe = Recipe.from_dict({"model": trained.base.source.spec, **sections})
    datasets = None
    classes = trained.classes
    if classes is not None and (settings.generate or settings.tasks):
        raise UsageError(f"{run} is a classifier, which writes no answers", "neither --generate nor --tasks")
    if file is not None:
        examples, row_report = load_eval_dataset(recipe, tokenizer, file, classes)
    else:
        datasets = load_datasets(recipe, tokenizer)
        examples = datasets.validation if settings.split == "validation" else datasets.test
        row_report = datasets.train_report
        if not examples:
            none = f"{getattr(recipe.data, f'{settings.split}_fraction')} of {row_report.kept} rows is none"
            expected = f"data.{settings.split} in the recipe, or a file"
            raise UsageError(f"training set no rows aside: {none}", expected, "--data FILE")
    prompts, generator = [], None
    if settings.generate:
        generator = Generator(trained)
        found = open_rows_from_recipe(recipe, file or recipe.data.train).require_valid_rows()
        rows = (split_pair(row)[0] for row in found)
        prompts = sample_prompts(rows, examples, settings.generate)
        for prompt in prompts:  # check that each has room for an answer before anything is scored
            generator.tokenize_prompt(prompt.messages, settings.max_new_tokens)
    general: list[Example] = []
    if settings.general_text is not None and classes is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4 * WINDOW
        general = tokenize_general_text(pieces, settings.general_text, tokenizer, min(context // 2, 2 * WINDOW))
    trained_rows: list[int] = []
    rows_checked = False
    if trained.recipe is not None:
        trained_rows, rows_checked = find_training_rows(recipe, file, examples, datasets)
    if len(trained_rows) == len(examples.documents):
        raise DataError(
            f"the run was trained on all {len(trained_rows)} rows of {file or 'its validation split'}: their loss only "
            "says what it remembers",
            "rows that the run was not trained on",
            "--data FILE, or data.test in the recipe",
        )
    if trained_rows:
        examples = examples.select(np.setdiff1d(np.arange(len(examples.documents)), trained_rows))
    objective = recipe.objective()
    is_pairs = objective.rows_per_example == 2 and objective.task_type == "CAUSAL_LM"
    pairs = examples if is_pairs else None
    longest = max(int(examples.lengths.max()), *(len(e["input_ids"]) for e in general), 0)
    collator = build_collator(recipe, model, tokenizer, longest)
    draws = {"draws": settings.bootstrap, "seed": settings.seed}
    name = settings.split if settings.data is None else f"data-{settings.data.stem}"
    facts = {
        "run": str(run),
        "task": recipe.task.name,
        "split": None if settings.data is not None else settings.split,
        "data": str(file or recipe.data.train),
        "training_rows": len(trained_rows) if rows_checked else None,
    }
    details = {
        "dropped": row_report.dropped,
        "truncated": row_report.truncated,
        "dtype": str(trained.base.dtype).removeprefix("torch."),
        "quantization": trained.base.quantization,
    }
    result: dict[str, Any]
    if classes is not None:
        if classes.names:
            measured, scores = evaluate_classifier(model, examples, collator, classes, **draws)
        else:
            measured, scores = evaluate_reward_model(model, examples, collator, objective, **draws)
        reasons = list_reasons_not_better(measured)
        verdict = {"passed": not reasons, "reasons": reasons}
        result = {**facts, **measured, "improved": not reasons, "verdict": verdict, **details}
        save_result(run_dir, name, result, scores, start)
        return result

    def score_both(
        rows: Sequence[Example], place: object = file or "the training file"
    ) -> tuple[list[RowScore], list[RowScore]]:
        tuned = evaluate_rows(model, rows, collator)
        with model.disable_adapter():
            base = evaluate_rows(model, rows, collator)
        for who, scored, error in (("base", base, ModelError), ("tuned model", tuned, AdapterError)):
            if lines := [e["line"] for e, score in zip(rows, scored, strict=True) if not math.isfinite(score.nats)]:
                raise error(
                    f"the loss of the {who} is NaN or Inf on {len(lines)} of {len(scored)} rows "
                    f"(lines {format_names(lines)} of {place})",
                    "finite losses",
                    "evaluate in float32, or take an older checkpoint",
                )
        return base, tuned

    preference = None
    if pairs is not None:  # the chosen answers are also measured as rows
        examples = FirstRows(pairs)
        logps = [score_row_logps(model, pairs, collator)]
        with model.disable_adapter():
            logps.insert(0, score_row_logps(model, pairs, collator))
    base, tuned = (sum_by_document(examples, scores) for scores in score_both(examples))
    tokens = [score.tokens for score in base]
    # Rows that are equal count together, as one row: drawn apart they would make the intervals too narrow.
    groups = examples.documents.groups()

    def sums(values: Sequence[float]) -> list[float]:
        return np.bincount(groups, values).tolist()

    grouped: Any = sums(tokens)
    loss = paired_bootstrap(sums([s.nats for s in base]), sums([s.nats for s in tuned]), grouped, **draws)
    hits = paired_bootstrap(sums([s.hits for s in tuned]), sums([s.hits for s in base]), grouped, **draws)
    dependence = forgetting = None
    if pairs is not None:
        by_pair = [[scores[i] for i in range(len(pairs))] for scores in logps]
        preference = measure_preferences(pairs, by_pair[0], by_pair[1], groups, **draws)
    elif not settings.skip_prompt_test and examples.documents is examples:  # a window has no prompt
        dependence = prompt_dependence(shuffle_prompts(examples, settings.seed), base, tuned, score_both, **draws)
    if settings.general_text is not None:
        forgetting = {"text": str(settings.general_text)}
        score_general = functools.partial(score_both, place=settings.general_text)
        forgetting |= measure_forgetting(general, score_general, settings.forgetting_budget, **draws)
    result = {
        **facts,
        "rows": len(tokens),
        "tokens": sum(tokens),
        **_format_pair("loss", loss.base, loss.tuned),
        "loss_reduction": loss.difference.value,
        "loss_reduction_ci95": loss.difference.interval,
        **_format_pair("perplexity", *(Estimate(*map(perplexity, e)) for e in (loss.base, loss.tuned))),
        **_format_pair("accuracy", hits.tuned, hits.base),
        "accuracy_gain": hits.difference.value,
        "accuracy_gain_ci95": hits.difference.interval,
        "rows_better": sum(t.nats < b.nats for b, t in zip(base, tuned, strict=True)),
        "different_rows": len(grouped),
        "preference": preference,
        "prompt_dependence": dependence,
        "forgetting": forgetting,
    }
    result |= {
        "improved": not list_reasons_not_improved(result),
        "generations": None,
        "generation_summary": None,
        "tasks": None,
        "verdict": make_verdict(result),
        **details,
    }
    scores = [
        {"line": line, "tokens": b.tokens, "base": b.nats, "tuned": t.nats}
        for line, b, t in zip(examples.documents.lines, base, tuned, strict=True)
    ]

    def save() -> None:
        save_result(run_dir, name, result, scores, start)

    save()  # the figures stay if generation or a task fails
    if generator is not None:
        result["generations"] = generate_base_and_tuned_answers(generator, prompts, checks, settings.max_new_tokens)
        result["generation_summary"] = summarize_checks(result["generations"])
        result["verdict"] = make_verdict(result)
        save()
    if settings.tasks:
        result["tasks"] = run_tasks(trained, settings.tasks, task_manager)
        save()
    return result


def save_result(
    run_dir: RunDir | None, name: str, result: dict[str, Any], scores: list[dict[str, Any]], start: float
) -> None:
    """Write a result, its rows and the report into the run folder, if there is one; `name` is that of the rows."""
    result["seconds"] = round(time.perf_counter() - start, 3)
    if run_dir is not None:
        write_json(run_dir.evaluation_file(name), result)
        write_json(run_dir.scores_file(name), scores, indent=None)
        write_report(run_dir)


def list_reasons_not_improved(result: Mapping[str, Any]) -> list[str]:
    """Return why the tuned model is not better than the base, one sentence each; empty if it is better."""
    failures = []
    low, high = result["loss_reduction_ci95"]
    if (different := result.get("different_rows", MIN_ROWS)) < MIN_ROWS:
        rows = "1 row is" if different == 1 else f"{different} different rows are"
        failures.append(f"{rows} too few to show that the tuned model is better: {MIN_ROWS} are the least")
    if result.get("preference") is not None:  # the loss of the chosen answers may rise while they are preferred more
        return [*failures, *list_reasons_not_preferred(result["preference"])]
    if low == high == 0 and result.get("rows_better") == 0:
        failures.append("the adapter changes nothing: base and tuned model have the same loss")
    elif low <= 0:
        what = "is worse than the base" if high < 0 else "is not shown to be better than the base"
        interval = f"its loss reduction is between {low:.4f} and {high:.4f} nats per token"
        failures.append(f"the tuned model {what}: {interval}")
    dependence = result["prompt_dependence"]
    if dependence is not None and not dependence["passed"]:
        low, high = dependence["tuned_ci95"]
        if low <= MIN_DEPENDENCE:
            failures.append(
                "the prompt is not shown to help the tuned model predict its answer: by "
                f"{low:.4f} to {high:.4f} nats per token, where more than {MIN_DEPENDENCE} is required"
            )
        else:
            low, high = dependence["change_ci95"]
            failures.append(
                "the tuned model depends less on its prompts: the help of a prompt fell from "
                f"{dependence['base']:.4f} to {dependence['tuned']:.4f} nats per token, by {-high:.4f} to {-low:.4f}"
            )
    return failures


def make_verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"passed": bool, "reasons": [sentence, …]}` of a whole result."""
    reasons, forgetting = list_reasons_not_improved(result), result["forgetting"]
    if forgetting is not None and not forgetting["within"]:
        low, high = forgetting["change_ci95"]
        reasons.append(
            f"it forgot more than its budget of {forgetting['budget']:g} nats per token on general text: "
            f"{forgetting['change']:.4f}, between {low:.4f} and {high:.4f}"
        )
    answers = result.get("generations")
    if answers and not any(answer["tuned"].strip() for answer in answers):
        reasons.append(f"all {len(answers)} answers of the tuned model are empty")
    return {"passed": not reasons, "reasons": reasons}


def sum_by_document(examples: TokenizedDataset, scores: Sequence[RowScore]) -> list[RowScore]:
    """Return the scores of documents from those of their windows; the scores of other rows are their own."""
    nats, hits, tokens = (np.bincount(examples.owners, values) for values in zip(*scores, strict=True))
    return [RowScore(float(n), int(h), int(t)) for n, h, t in zip(nats, hits, tokens, strict=True)]


def find_training_rows(
    recipe: Recipe, file: Path | None, examples: TokenizedDataset, datasets: Datasets | None
) -> tuple[list[int], bool]:
    """Return which of the evaluated rows (or documents) the run was trained on, and whether its rows could be read.

    Args:
        recipe: of the run.
        file: that the evaluated rows are from; None: `datasets` holds them.
        examples: the evaluated rows.
        datasets: the rows of the run, if they are loaded.
    """
    if file is None and datasets is not None:
        learned = set(datasets.train.documents.hashes())
        return [i for i, key in enumerate(examples.documents.hashes()) if key in learned], True

    def read(path: Path) -> Iterator[tuple[int, int]]:
        rows = (row for row in open_rows_from_recipe(recipe, path) if isinstance(row, Row))
        return (
            (row.line, hash(repr((row.messages, row.prompt, row.completion, row.chosen, row.rejected, row.tools))))
            for row in rows
        )

    evaluated = list(read(file or recipe.data.train))
    wanted = {key for _, key in evaluated}
    try:
        trained = {key for _, key in read(recipe.data.train) if key in wanted}
    except SlimtuneError:
        return [], False
    # Rows that were dropped have no example; the others are in the order of the file.
    rows = iter(evaluated)
    keys = [next(key for line, key in rows if line == own) for own in examples.documents.lines]
    return [i for i, key in enumerate(keys) if key in trained], True


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
        problem = f"{run} is an adapter folder without a recipe, so its held-out rows are unknown"
        raise UsageError(problem, "rows the adapter was not trained on", "--data FILE")
    data = run_dir.load_recipe().data
    file = data.test if split == "test" else data.validation
    has_validation = data.validation is not None or data.validation_fraction > 0
    if file is None and not (has_validation if split == "validation" else data.test_fraction > 0):
        raise UsageError(
            f"the recipe of {run} names no {split} rows",
            f"data.{split} in {run_dir.recipe_file}, or a file",
            f"--data FILE{', or --split validation' if split == 'test' and has_validation else ''}",
        )
    return file


def _format_pair(name: str, base: Estimate, tuned: Estimate) -> dict[str, Any]:
    both = {f"base_{name}": base, f"tuned_{name}": tuned}
    return {k: e.value for k, e in both.items()} | {f"{k}_ci95": e.interval for k, e in both.items()}
