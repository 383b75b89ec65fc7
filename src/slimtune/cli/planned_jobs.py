"""The runs that `slimtune plan` and `slimtune gpus --for` plan: a base or a recipe, and flags.

Each is the recipe that would train it, so that `slimtune train` runs what was planned, defaults included.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typer import Argument, Option

from ..errors import SlimtuneError, UsageError
from .common import print_progress
from .input_checks import list_missing_base_and_data_errors
from .row_checks import require_valid_first_rows

if TYPE_CHECKING:
    from ..core.config import Recipe
    from ..core.data.example_lengths import DatasetRowComposition, ExampleLength
    from ..core.models.base_config import LoadedBaseConfig
    from ..hardware.hardware_results import UnplannedGpus
    from ..planning.gpu_specs import GpuSpec
    from ..planning.interval import Interval
    from ..planning.plan_result import Advice, MemoryVerdict, ResourceEstimate

ROW_SETTINGS = (
    "data.format", "data.columns", "data.ignore_columns", "data.train_on", "data.max_seq_len", "data.on_overlong",
    "data.apply_chat_template", "data.chat_template",
)  # fmt: skip
"""The settings that say how rows are read: commands that read rows have the same flags for them."""
JOB_SETTINGS = (
    "model.dtype", "model.quantization", "model.trust_remote_code", "data.train", *ROW_SETTINGS,
    "task.name", "method.name", "train.epochs", "train.max_steps", "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.max_tokens_per_micro_batch", "train.packing", "train.optimizer", "train.gradient_checkpointing",
    "train.offload_activations", "train.mlp_tile_size", "train.fsdp",
)  # fmt: skip
"""The settings with a flag: those that change a plan. `--set` takes all."""

JOB = Argument(
    metavar="MODEL|RECIPE.yaml",
    help="A base (alias, Hub id, folder or GGUF file), or a recipe; flags override it.",
    show_default=False,
)
SERVE_ENGINE = Option(help="With --serve: llama.cpp, mlx, ollama or vllm.")
SERVE_PRECISION = Option(help="With --serve: precision of the served weights, such as bf16 or q4_k_m.")
SERVE_CONTEXT = Option(min=1, help="With --serve: tokens of the longest conversation.")


@dataclass(frozen=True)
class RunsToPlan:
    """The runs to plan, one for each method."""

    recipes: dict[str, Recipe]  # by the method's name
    errors: dict[str, SlimtuneError]  # why there is no recipe, by the method's name
    base_config: LoadedBaseConfig
    has_rows: bool  # whether training rows were given
    example_lengths: list[ExampleLength]  # of every training example; empty if no rows were read
    row_composition: DatasetRowComposition  # of the training examples, if rows were read
    tokens: int | None  # of a whole run; None if no rows were read

    def find_learning_rates(self, method: str) -> tuple[float | None, float | None]:
        """Return the learning rate of a run and the one that training takes by itself; None if it depends on rows."""
        from ..core.models.base_config import get_hidden_size
        from ..core.training.default_learning_rate import compute_default_learning_rate

        recipe, rows = self.recipes[method], len(self.example_lengths)
        default = (
            compute_default_learning_rate(recipe, rows, get_hidden_size(self.base_config.config)) if rows else None
        )
        chosen = recipe.train.learning_rate
        return default if chosen == "auto" else float(chosen), default


def find_recipe_file(model_or_recipe: str | None) -> Path | None:
    """Return the recipe that an argument names: its file, or the run folder that it is in; None if it names a base."""
    if model_or_recipe is None or model_or_recipe.endswith((".yaml", ".yml")):
        return Path(model_or_recipe) if model_or_recipe is not None else None
    file = Path(model_or_recipe, "recipe.yaml")
    return file if os.path.isfile(file) else None


def load_run_to_plan(
    model_or_recipe: str,
    settings: Mapping[str, Any],
    several_methods_error: str = "several methods are given",
    hint: str = "--method lora",
) -> RunsToPlan:
    """Return the one run that an argument and flags describe; raise UsageError if they name several methods."""
    jobs = load_runs_to_plan(model_or_recipe, settings)
    if len(jobs.recipes) > 1 or jobs.errors:
        raise UsageError(several_methods_error, "one run", hint)
    return jobs


def load_runs_to_plan(
    model_or_recipe: str, settings: Mapping[str, Any], output_dir: str = "runs/planned"
) -> RunsToPlan:
    """Return the runs that an argument and flags describe.

    Args:
        model_or_recipe: a base, or a recipe's file.
        settings: overrides by dotted path; `method.name` may name several methods, or "all".
        output_dir: the run folder of a base's recipe.
    """
    recipes, errors = _load_recipes(model_or_recipe, settings, output_dir)
    recipe = next(iter(recipes.values()))
    has_rows = find_recipe_file(model_or_recipe) is not None or "data.train" in settings
    if has_rows:
        require_valid_first_rows(recipe.data, recipe.objective())

    gc.disable()  # these imports make half a million objects and little garbage
    try:
        from ..core.data.example_lengths import ALL_SUPERVISED, count_tokens_per_row
        from ..core.models.base_config import load_base_config
        from ..planning import planner  # noqa: F401
    finally:
        gc.enable()
    m, t = recipe.model, recipe.train
    model = load_base_config(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
    lengths, content = _read_lengths(recipe, model) if has_rows else ([], ALL_SUPERVISED)
    epochs = t.epochs
    if t.max_steps is not None:
        epochs = t.max_steps * t.rows_per_step / max(len(lengths), 1)
    tokens = sum(n for length in lengths for n in count_tokens_per_row(length))
    return RunsToPlan(recipes, errors, model, has_rows, lengths, content, round(epochs * tokens) or None)


def _load_recipes(
    job: str, settings: Mapping[str, Any], output_dir: str
) -> tuple[dict[str, Recipe], dict[str, SlimtuneError]]:
    """Return the recipe for each method, and why others have none; raise if none has one. It needs no torch."""
    from ..core.config import Recipe
    from ..core.config.method_settings import map_method_setting_specs_by_name
    from ..core.config.recipe_loading import find_method_or_task_name, read_recipe_tree, replace_recipe_values

    path = find_recipe_file(job)
    # A plan needs no rows and no run folder, but a complete recipe does.
    base = {} if path is not None else {"model.name": job, "data.train": "rows.jsonl", "output_dir": output_dir}
    extra_checks = partial(
        list_missing_base_and_data_errors, need_weights=False, need_rows=path is not None or "data.train" in settings
    )
    tree = read_recipe_tree(path)
    methods = _list_methods(find_method_or_task_name("method", tree, settings))
    accepted = {method: set(map_method_setting_specs_by_name(method)) for method in methods}
    recipes: dict[str, Recipe] = {}
    errors: dict[str, SlimtuneError] = {}
    for method in methods:
        # A setting goes to the methods that have it; one that none has goes to all, whose errors name it.
        others = set().union(*accepted.values()) - accepted[method]
        own = {p: v for p, v in settings.items() if not (p.startswith("method.") and p.split(".")[1] in others)}
        changes = {**base, **own, "method.name": method}
        try:
            recipes[method] = Recipe.from_dict(
                replace_recipe_values(tree, changes), str(path or "the flags"), extra_checks
            )
        except UsageError as e:
            errors[method] = e
    if not recipes:
        raise errors[methods[0]]
    return recipes, errors


def _list_methods(text: Any) -> list[str]:
    """Return the methods that a text names, "lora,ia3" or "all"; they exist."""
    from ..core.adapters.method_registry import list_methods, require_known_method_name

    named = [part.strip().lower() for part in str(text).split(",") if part.strip()]
    if not named:
        raise UsageError("--method names none", "methods as lora,ia3, or all")
    expanded = (name for part in named for name in (list_methods() if part == "all" else (part,)))
    return list(dict.fromkeys(map(require_known_method_name, expanded)))


def estimate_runs_collecting_errors(
    jobs: RunsToPlan, gpu: GpuSpec, *, advise: Advice = "all", processes: int = 1, raise_if_none: bool = True
) -> tuple[list[ResourceEstimate], dict[str, SlimtuneError]]:
    """Return the estimate of every run on a GPU, for one of `processes` that train together, and why others have none.

    Changes that save memory are looked for if there is a single run, as `advise` says to `estimate_resources`. If no
    run can be planned, the error of the first is raised, unless `raise_if_none` is false.
    """
    from ..planning.plan_request import build_plan_request
    from ..planning.planner import estimate_resources

    estimates: list[ResourceEstimate] = []
    errors = dict(jobs.errors)
    for method, recipe in jobs.recipes.items():
        print_progress(f"planning {jobs.base_config.name}, {method}, on {gpu.name}")
        try:
            request = build_plan_request(recipe, gpu, jobs.example_lengths, processes, jobs.row_composition)
            estimates.append(estimate_resources(request, advise=advise if len(jobs.recipes) == 1 else "none"))
        except SlimtuneError as e:
            errors[method] = e
    if not estimates and raise_if_none:
        raise next(errors[method] for method in jobs.recipes)
    return estimates, errors


def find_smaller_base_of_run(jobs: RunsToPlan, gpu: GpuSpec, processes: int) -> str | None:
    """Return a dense base on which the one planned run fits, to suggest it; None if none is found."""
    from ..planning.plan_request import build_plan_request
    from ..planning.smaller_bases import find_smaller_base_that_fits

    (recipe,) = (recipe for method, recipe in jobs.recipes.items() if method not in jobs.errors)
    print_progress(f"looking for a smaller base that fits on {gpu.name}")
    return find_smaller_base_that_fits(
        build_plan_request(recipe, gpu, jobs.example_lengths, processes, jobs.row_composition)
    )


def _read_lengths(recipe: Recipe, model: LoadedBaseConfig) -> tuple[list[ExampleLength], DatasetRowComposition]:
    """Return the lengths and the content of the training examples.

    There are none if the tokenizer is not on this disk: nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    from ..core.data.example_lengths import ALL_SUPERVISED
    from ..core.models.model_source import resolve_model_source
    from ..core.training.base_model import load_base_tokenizer
    from ..core.training.datasets import tokenize_recipe_datasets

    try:
        source = resolve_model_source(model.spec)
        on_disk = source.kind != "hub" or isinstance(try_to_load_from_cache(source.path, "tokenizer_config.json"), str)
    except SlimtuneError:
        on_disk = False  # only a config.json
    if not on_disk:
        taken = f"every row is taken to have {recipe.data.max_seq_len} tokens"
        print_progress(f"rows are not read, the tokenizer of {model.spec} is not on this disk: {taken}")
        return [], ALL_SUPERVISED
    # A plan knows more names of bases than training does: `spec` is where the weights are.
    recipe = replace(recipe, model=replace(recipe.model, name=model.spec))
    datasets = tokenize_recipe_datasets(recipe, load_base_tokenizer(recipe.model, recipe.data.chat_template))
    print_progress(f"rows: {datasets.train_stats.text()}")
    for report in datasets.data_reports.values():
        if report is not None and report.verdict == "errors":
            why = f"{report.format_verdict()} (slimtune data shows them)"
            print_progress(f"training will refuse {report.file}: {why}")
    return datasets.train.example_lengths, datasets.train.content


class EquivalentGpuGroup(NamedTuple):
    """GPUs that compute a run alike."""

    device: str  # the kind of device that torch calls them
    bf16: bool  # whether dtype "auto" is bfloat16 on them, or the run has another dtype

    def __str__(self) -> str:
        return ("Macs" if self.device == "mps" else "GPUs") + ("" if self.bf16 else " without bf16")


@dataclass(frozen=True)
class GpuEstimate:
    """A run on one of many GPUs."""

    gpu: GpuSpec
    estimate: ResourceEstimate  # on this GPU, or on another one that computes alike
    verdict: MemoryVerdict
    speed: Interval | None  # trained tokens a second


def estimate_run_by_gpu_and_class(
    jobs: RunsToPlan, gpus: Sequence[GpuSpec], *, use_smallest_of_group: bool
) -> tuple[list[GpuEstimate], dict[EquivalentGpuGroup, ResourceEstimate], list[UnplannedGpus]]:
    """Return the run on each GPU, the estimate of each class, and the GPUs of classes that cannot be planned.

    A run is planned once for each class: on its smallest GPU, where a batch is split as far as training splits it if
    memory is short, so the need is what a GPU must have at least; or on its largest. If no class can be planned, the
    error of the first is raised.
    """
    from ..hardware.hardware_results import UnplannedGpus
    from ..planning.planner import judge_memory_fit
    from ..planning.throughput import estimate_training_speed

    (recipe,) = jobs.recipes.values()

    def class_of(gpu: GpuSpec) -> EquivalentGpuGroup:
        return EquivalentGpuGroup(gpu.device, gpu.bf16 or recipe.model.dtype != "auto")

    ordered = sorted(gpus, key=lambda g: g.memory)
    planned = {
        class_of(gpu): gpu for gpu in (reversed(ordered) if use_smallest_of_group else ordered)
    }  # the last of each class
    made: dict[EquivalentGpuGroup, ResourceEstimate] = {}
    errors: dict[EquivalentGpuGroup, SlimtuneError] = {}
    for key, gpu in planned.items():
        try:
            made[key] = estimate_runs_collecting_errors(jobs, gpu, advise="none")[0][0]
        except SlimtuneError as error:
            errors[key] = error
    if errors and not made:
        raise next(iter(errors.values()))
    unplanned = [
        UnplannedGpus(str(key), [g.name for g in gpus if class_of(g) == key], error.message)
        for key, error in errors.items()
    ]
    found = []
    for gpu in gpus:
        if (estimate := made.get(class_of(gpu))) is None:
            continue
        speed = estimate_training_speed(estimate.work, gpu) if estimate.work is not None else estimate.tokens_per_second
        found.append(GpuEstimate(gpu, estimate, judge_memory_fit(estimate.need_bytes, gpu.usable), speed))
    return found, made, unplanned
