"""Compare the tuned model with its base: held-out loss, perplexity and accuracy with intervals, and a verdict.

The same model in the same arrangement of rows scores every row twice, with the adapter and without it, so nothing but
the adapter makes the difference. The tuned model is improved if the whole interval of its loss reduction is above 0 and
its answers still depend on their prompts. It passes if it also forgot no more than its budget.
"""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from ..core.config import DataSettings, Recipe, TaskSettings, TrainSettings
from ..core.data.collator import Example
from ..core.data.rows import Row, split_preference_into_rows
from ..core.data.tokenize import TokenizationStats
from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.files import write_json
from ..core.foundation.progress_bars import using_progress_prefix
from ..core.models.base_config import get_max_positions
from ..core.training.datasets import load_eval_dataset_and_stats, tokenize_recipe_datasets
from ..core.training.forgetting_budget import DEFAULT_FORGETTING_BUDGET
from ..core.training.held_out_rows import MIN_EVAL_ROWS
from ..core.training.loss import build_run_collator
from ..core.training.objective import Objective, open_rows_for_objective
from ..core.training.run_dir import RunDir, find_adapter_folder
from ..core.training.trained_model import TrainedModel, load_run
from ..errors import DataError, SlimtuneError, UsageError, format_names, suggest
from ..extras.row_files import open_rows
from ..extras.row_formats.documents import DocumentWindows
from ..extras.training_fingerprint import require_rows_unchanged_since_training
from ..generation.generation_models import GenerationModel, make_base_and_tuned_models
from ..generation.text_generator import TextGenerator
from ..objectives.classification import Classification
from ..objectives.context import Context
from ..objectives.kto import KTO
from ..objectives.pair_objective import PairObjective
from ..objectives.policy_objective import PolicyObjective
from ..objectives.reward import Reward
from ..objectives.sft import SFT
from ..objectives.teacher_objective import TeacherObjective
from .classification_comparison import ClassifierEvaluator, RewardModelEvaluator
from .context_comparison import ContextEvaluator
from .eval_result import EvalResult, EvalVerdict, PolicyEvalResult, TextEvalResult
from .forgetting import measure_forgetting
from .general_text import build_general_text_examples, read_general_text_pieces
from .generated_answers import (
    EvalPrompt,
    average_answer_checks,
    build_answer_check,
    generate_base_and_tuned_answers,
    select_eval_prompts,
)
from .judge import add_judge_verdicts, build_answer_judge, compute_win_rate_and_biases
from .lm_eval import load_lm_eval_task_manager, score_base_and_tuned_by_lm_eval
from .model_comparison import ModelComparison, are_windows_of_few_documents
from .next_steps import list_next_steps
from .output_files import resolve_output_file
from .preference_comparison import KTOEvaluator, PreferenceComparison
from .run_report import write_run_report_and_list_damage
from .sampled_answer_comparison import SampledAnswerComparison
from .sft_comparison import SupervisedLossEvaluator

COMPARISONS: dict[type[Objective], type[ModelComparison[Any]]] = {
    SFT: SupervisedLossEvaluator,
    PairObjective: PreferenceComparison,
    KTO: KTOEvaluator,
    Classification: ClassifierEvaluator,
    Reward: RewardModelEvaluator,
    PolicyObjective: SampledAnswerComparison,
    Context: ContextEvaluator,
    TeacherObjective: SupervisedLossEvaluator,
}
"""The comparison of each objective and of its subclasses."""
FEW_EVAL_ROWS = 20
"""Rows below which a bootstrap interval is too narrow."""
SPLITS = ("test", "validation")
AnyResult = TypeVar("AnyResult", bound=EvalResult)


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
    general_text: Path | None = None  # that the adapter never saw, .txt or JSONL (`general_text.BUILT_IN_TEXT`)
    forgetting_budget: float = DEFAULT_FORGETTING_BUDGET  # nats per token that may be lost on it, 0 or more
    generate: int = 0  # held-out prompts that base and tuned model answer, 0 or more
    max_new_tokens: int = 128  # longest answer in tokens, 1 or more
    checks: Sequence[str] = ()  # of the answers, by the names in `generated_answers.py`
    judge: str | None = None  # that compares the answers of both models, by a name of `judge.py`
    tasks: Sequence[str] = ()  # of lm-evaluation-harness
    tasks_path: Path | None = None  # a folder of the user's task files
    device: str | None = None  # to run on; None: the run's

    def __post_init__(self) -> None:
        for name, least in (("bootstrap", 1), ("forgetting_budget", 0), ("generate", 0), ("max_new_tokens", 1)):
            if not least <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}", f"{least} or more")
        if self.judge is not None and not self.generate:
            raise UsageError("--judge compares answers, and none are asked for", hint="--generate 50")


@dataclass(frozen=True)
class EvalRecipeSections:
    """The sections of a recipe that an evaluation reads."""

    data: DataSettings
    task: TaskSettings
    train: TrainSettings

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Return a recipe's sections."""
        return cls(recipe.data, recipe.task, recipe.train)


def evaluate(run: Path, settings: EvalSettings | None = None) -> EvalResult:
    """Compare base and tuned model and return what `slimtune eval --json` prints.

    A run folder keeps the result as `eval-<split>.json` (`eval-data-<name>.json` for a file) whatever the verdict, and
    beside it `scores-<split>.json`: for each row its `line`, its supervised `tokens`, and the loss in nats of `base`
    and `tuned`; for a preference pair those of its chosen answer, and `base_margin` and `tuned_margin`. Losses are in
    nats per supervised token.

    Args:
        run: a run folder, or an adapter folder (then `data` is required).
        settings: what to measure.

    Raises:
        UsageError: the run, rows, text, check, judge or task does not exist, or a prompt leaves no room for an answer.
        DataError: the rows or the text are faulty.
        AdapterError: the adapter does not fit, or its loss is NaN or Inf.
        ModelError: the base cannot be loaded, a package is missing, or the harness fails.
    """
    start = time.perf_counter()
    run, settings = Path(run), settings or EvalSettings()
    checks = {name: build_answer_check(name) for name in settings.checks}
    judge = None if settings.judge is None else build_answer_judge(settings.judge)
    task_manager = load_lm_eval_task_manager(settings.tasks, settings.tasks_path) if settings.tasks else None
    run_dir = None if find_adapter_folder(run) == run else RunDir.open(run)
    if run_dir is not None:
        resolve_output_file(run_dir.report_file)
    file = _find_eval_file(run_dir, run, settings)
    if file is not None:  # report faulty rows before the model is loaded
        own = _read_as_pairs(EvalRecipeSections.from_recipe(run_dir.load_recipe()), file) if run_dir else None
        rows = open_rows(file) if own is None else open_rows_for_objective(file, own.data, own.task.build_objective())
        deque(rows.require_valid_rows(), maxlen=0)
    pieces = [] if settings.general_text is None else read_general_text_pieces(settings.general_text)

    trained = load_run(run, device=settings.device)
    model: Any = trained.model
    tokenizer = trained.base.tokenizer
    sections = _read_as_pairs(_choose_eval_sections(trained, file), file)
    objective = sections.task.build_objective()
    writes_text = objective.task_type == "CAUSAL_LM"
    if not writes_text and (settings.generate or settings.tasks):
        raise UsageError(f"{run} is a classifier, which writes no answers", "neither --generate nor --tasks")
    if isinstance(objective, PolicyObjective) and (settings.generate or settings.tasks):
        problem = f"{run} learned by {objective.name}, whose evaluation samples and scores answers by itself"
        raise UsageError(problem, "neither --generate nor --tasks", "slimtune generate and chat show answers")
    examples, row_report, training_rows = _load_unseen_rows(trained, sections, file, settings.split)
    if isinstance(examples, DocumentWindows) and are_windows_of_few_documents(examples):
        examples = examples.cut_into(FEW_EVAL_ROWS)
    # A prompt that leaves no room for an answer is refused before anything is scored.
    asked = _prepare_prompts(trained, sections, file, examples, settings) if settings.generate else None
    general: list[Example] = []
    if settings.general_text is not None and writes_text:
        general = build_general_text_examples(pieces, settings.general_text, tokenizer, get_max_positions(model.config))
    longest = max(int(examples.lengths.max()), *(len(e["input_ids"]) for e in general), 0)
    comparison = _build_comparison(trained, sections, examples, longest, file or "the training file", settings)
    measures, scores = comparison.measure()
    draws = {"draws": settings.bootstrap, "seed": settings.seed}
    parts: dict[str, Any] = {}
    if general:
        score_general = functools.partial(comparison.score_both, rows_source=settings.general_text)
        budget = settings.forgetting_budget
        with using_progress_prefix("general text"):
            parts["forgetting"] = measure_forgetting(
                str(settings.general_text), general, score_general, budget, **draws
            )
    reasons = [*_list_missing_rows(measures.different_rows), *comparison.list_reasons_not_better(measures)]
    warnings = comparison.list_warnings(measures)
    result = comparison.result_type(
        run=str(run),
        task=sections.task.name,
        split=None if settings.data is not None else settings.split,
        data=str(file or sections.data.train),
        training_rows=training_rows,
        measures=measures,
        improved=not reasons,
        verdict=EvalVerdict(passed=False),
        dropped=row_report.dropped,
        truncated=row_report.truncated,
        dtype=dtype_name(trained.base.dtype),
        quantization=trained.base.quantization,
        **parts,
    )
    name = settings.split if settings.data is None else f"data-{settings.data.stem}"

    def save(result: AnyResult) -> AnyResult:
        seconds = round(time.perf_counter() - start, 3)
        result = replace(result, verdict=make_pass_fail_eval_verdict(result, reasons, warnings), seconds=seconds)
        next_steps = list_next_steps(result, None if run_dir is None else trained.recipe)
        result = replace(result, verdict=replace(result.verdict, next_steps=next_steps))
        if run_dir is not None:
            write_json(run_dir.evaluation_file(name), result)
            write_json(run_dir.scores_file(name), scores, indent=None)
            write_run_report_and_list_damage(run_dir)
        return result

    result = save(result)  # the figures stay if generation or a task fails
    if isinstance(result, TextEvalResult):
        if asked is not None:
            answers = generate_base_and_tuned_answers(TextGenerator(model), *asked, checks, settings.max_new_tokens)
            result = save(replace(result, generations=answers, generation_summary=average_answer_checks(answers)))
            if judge is not None:
                answers = add_judge_verdicts(answers, judge)
                won = compute_win_rate_and_biases(str(settings.judge), answers, **draws)
                result = save(replace(result, generations=answers, win_rate=won))
        if settings.tasks:
            result = save(replace(result, tasks=score_base_and_tuned_by_lm_eval(trained, settings.tasks, task_manager)))
    return result


def _prepare_prompts(
    trained: TrainedModel,
    sections: EvalRecipeSections,
    file: Path | None,
    examples: TokenizedDataset,
    settings: EvalSettings,
) -> tuple[dict[str, GenerationModel], list[EvalPrompt]]:
    """Return base and tuned model and their held-out prompts; raise UsageError if one leaves no room for an answer."""
    models = make_base_and_tuned_models(trained)
    file, objective = file or sections.data.train, sections.task.build_objective()
    rows = open_rows_for_objective(file, sections.data, objective).require_valid_rows()
    prompts = select_eval_prompts((split_preference_into_rows(row)[0] for row in rows), examples, settings.generate)
    for prompt in prompts:
        models["tuned"].tokenize_prompt(prompt.messages, settings.max_new_tokens)
    return models, prompts


def _build_comparison(
    trained: TrainedModel, sections: EvalRecipeSections, examples: TokenizedDataset, longest: int, place: object,
    settings: EvalSettings,
) -> ModelComparison[Any]:  # fmt: skip
    """Return the comparison of the run's objective; `longest` are the tokens of the longest row that it scores."""
    model: Any = trained.model
    objective = sections.task.build_objective()
    kind = PairObjective if sections.data.format in objective.named_formats else type(objective)
    comparison_class = next(COMPARISONS[c] for c in kind.__mro__ if c in COMPARISONS)
    return comparison_class(
        model,
        examples,
        build_run_collator(sections.train, model, trained.base.tokenizer, longest),
        objective,
        trained.base.tokenizer,
        trained.classes,
        rows_source=place,
        draws=settings.bootstrap,
        seed=settings.seed,
        shuffled_prompt_test=not settings.skip_prompt_test,
    )


def _list_missing_rows(different_rows: int) -> list[str]:
    """Return the reason why so few rows show nothing; empty if there are enough."""
    rows = "1 row is" if different_rows == 1 else f"{different_rows} different rows are"
    reason = f"{rows} too few to show that the tuned model is better: {MIN_EVAL_ROWS} are the least"
    return [reason] if different_rows < MIN_EVAL_ROWS else []


def make_pass_fail_eval_verdict(
    result: EvalResult, reasons_not_improved: Sequence[str], warnings: Sequence[str] = ()
) -> EvalVerdict:
    """Return whether a whole result passes.

    Args:
        result: the result.
        reasons_not_improved: why the tuned model is not better.
        warnings: what its rows do not show although it is.
    """
    reasons, unread = list(reasons_not_improved), False
    if isinstance(result, TextEvalResult | PolicyEvalResult):
        forgetting = result.forgetting
        if forgetting is not None and not forgetting.within:
            low, high = forgetting.change.ci95
            reasons.append(
                f"it forgot more than its budget of {forgetting.budget:g} nats per token on general text: "
                f"{forgetting.change.value:.4f}, between {low:.4f} and {high:.4f}"
            )
    if isinstance(result, TextEvalResult):
        answers = result.generations
        unread = answers is None
        if answers and not any(answer.tuned.strip() for answer in answers):
            reasons.append(f"all {len(answers)} answers of the tuned model are empty")
    warnings, different = [*warnings], result.measures.different_rows
    if different < FEW_EVAL_ROWS:
        advice = "; read some answers: --generate 5" if unread else ""
        warnings.append(f"over only {different} rows: under about {FEW_EVAL_ROWS} the intervals are too narrow{advice}")
    return EvalVerdict(passed=not reasons, reasons=reasons, warning="" if reasons else "; ".join(warnings))


def _load_unseen_rows(
    trained: TrainedModel, sections: EvalRecipeSections, file: Path | None, split: str
) -> tuple[TokenizedDataset, TokenizationStats, int | None]:
    """Return the rows to measure on without those that the run was trained on, their report, and how many those were.

    Without a `file` they are those that training set aside as the `split` "test" or "validation". The last value is
    None if the run's training rows cannot be read.

    Raises:
        UsageError: training set no rows aside.
        DataError: rows are faulty, or the run was trained on all of them.
    """
    tokenizer = trained.base.tokenizer
    trained_rows: list[int] | None = None
    if file is None:
        assert trained.recipe is not None  # an adapter folder names no rows: a file is required
        datasets = tokenize_recipe_datasets(trained.recipe, tokenizer)
        require_rows_unchanged_since_training(trained.adapter_folder, datasets)
        examples, report = getattr(datasets, split), datasets.train_stats
        if not examples:
            none = f"{getattr(sections.data, f'{split}_fraction')} of {report.kept} rows is none"
            expected = f"data.{split} in the recipe, or a file"
            raise UsageError(f"training set no rows aside: {none}", expected, "--data FILE")
        learned = set(datasets.train.documents.hashes())
        trained_rows = [i for i, key in enumerate(examples.documents.hashes()) if key in learned]
    else:
        objective = sections.task.build_objective()
        examples, report = load_eval_dataset_and_stats(file, sections.data, objective, tokenizer, trained.classes)
        if trained.recipe is not None:
            if isinstance(objective, TeacherObjective):
                read = replace(trained.recipe, data=sections.data)
                examples = objective.add_teacher_rows(examples, file, read, tokenizer)
            trained_rows = _find_rows_trained_on(
                EvalRecipeSections.from_recipe(trained.recipe), sections, file, examples
            )
    if trained_rows is None:
        return examples, report, None
    if len(trained_rows) == len(examples.documents):
        raise DataError(
            f"the run was trained on all {len(trained_rows)} rows of {file or f'its {split} split'}: their loss only "
            "says what it remembers",
            "rows that the run was not trained on",
            "--data FILE, or data.test in the recipe",
        )
    if trained_rows:
        examples = examples.select(np.setdiff1d(np.arange(len(examples.documents)), trained_rows))
    return examples, report, len(trained_rows)


def _find_rows_trained_on(
    training: EvalRecipeSections, evaluation: EvalRecipeSections, file: Path, examples: TokenizedDataset
) -> list[int] | None:
    """Return which rows (or documents) of a file, read as `evaluation` says, a run was trained on.

    A run that learned answers alone was trained on a pair if it learned the chosen one. None: the training rows cannot
    be read.
    """
    answers_alone = evaluation.data.format in evaluation.task.build_objective().named_formats

    def read(sections: EvalRecipeSections, path: Path) -> Iterator[tuple[int, int]]:
        found = open_rows_for_objective(path, sections.data, sections.task.build_objective())
        rows = (row for row in found if isinstance(row, Row))
        rows = (split_preference_into_rows(row)[0] if answers_alone else row for row in rows)
        return ((row.line, hash(repr(dataclasses.replace(row, line=0, learned=None, file=None)))) for row in rows)

    evaluated = list(read(evaluation, file))
    wanted = {key for _, key in evaluated}
    try:
        trained = {key for _, key in read(training, evaluation.data.train) if key in wanted}
    except SlimtuneError:
        return None
    # Rows that were dropped have no example; the others are in the order of the file.
    rows = iter(evaluated)
    keys = [next(key for line, key in rows if line == line_kept) for line_kept in examples.documents.lines]
    return [i for i, key in enumerate(keys) if key in trained]


def _choose_eval_sections(trained: TrainedModel, file: Path | None) -> EvalRecipeSections:
    """Return a run's sections, or those for an adapter folder. Its base may be any, so its rows are not packed."""
    if trained.recipe is not None:
        return EvalRecipeSections.from_recipe(trained.recipe)
    task = TaskSettings()
    if trained.classes is not None:
        task = TaskSettings(name="classification" if trained.classes.names else "reward")
    return EvalRecipeSections(DataSettings(train=file or Path()), task, TrainSettings(packing=False))


def _read_as_pairs(sections: EvalRecipeSections, file: Path | None) -> EvalRecipeSections:
    """Return the sections with the format of preference pairs, if the file has them and the run learned answers."""
    if "preference" not in sections.task.build_objective().named_formats or file is None:
        return sections
    try:
        found = open_rows(file).format
    except SlimtuneError:  # it needs the recipe's columns, or has an error that is reported as it is read
        return sections
    if found != "preference":
        return sections
    return replace(sections, data=replace(sections.data, format="preference", columns={}, ignore_columns=[]))


def _find_eval_file(run_dir: RunDir | None, run: Path, settings: EvalSettings) -> Path | None:
    """Return the file to measure on, or None for the rows that training set aside from its own file.

    Raises:
        UsageError: the split is unknown, or the run names no rows for it.
    """
    split = settings.split
    if settings.data is not None:
        return Path(settings.data)
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}{suggest(split, SPLITS)}", f"one of {format_names(SPLITS)}")
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
