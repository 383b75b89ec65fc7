"""The runs that `slimtune plan` and `slimtune gpus --for` plan: a base or a recipe, and flags.

Each is the recipe that would train it, so that `slimtune train` runs what was planned, defaults included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SlimtuneError, UsageError, format_names, nearest
from .common import error_console, print_progress

if TYPE_CHECKING:
    from ..config import Recipe
    from ..models.registry import ModelInfo
    from ..planning.gpus import Gpu
    from ..planning.result import Plan

JOB_SETTINGS = (
    "model.dtype",
    "model.quantization",
    "model.trust_remote_code",
    "data.train",
    "data.max_seq_len",
    "method.name",
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.max_tokens_per_micro_batch",
    "train.packing",
    "train.optimizer",
    "train.gradient_checkpointing",
    "train.offload_activations",
    "train.mlp_tile_size",
    "train.fsdp",
)
"""The settings with a flag: those that change a plan. `--set` takes all."""


@dataclass(frozen=True)
class Jobs:
    """The runs to plan, one for each method.

    Args:
        recipes: by the method's name.
        errors: why there is no recipe, by the method's name.
        model: the base.
        has_rows: whether training rows were given.
        lengths: tokens of every training row; empty if no rows were read.
        tokens: tokens of a whole run; None if no rows were read.
    """

    recipes: dict[str, Recipe]
    errors: dict[str, SlimtuneError]
    model: ModelInfo
    has_rows: bool
    lengths: list[int]
    tokens: int | None

    @property
    def dtype(self) -> str:
        """Data type of the base's weights; "auto": the GPU's choice."""
        return next(iter(self.recipes.values())).model.dtype


def load_jobs(job: str, settings: Mapping[str, Any], output_dir: str = "runs/planned") -> Jobs:
    """Return the runs that an argument and flags describe.

    Args:
        job: a base, or a recipe's file.
        settings: overrides by dotted path; `method.name` may name several methods, or "all".
        output_dir: the run folder of a base's recipe.

    Raises:
        UsageError: an unknown base, method or quantization; errors in the recipe; a setting that no method has.
        ModelError: the base's config or its tokenizer cannot be read.
        DataError: the rows are faulty.
    """
    from ..config import load_recipe
    from ..config.loading import read_tree
    from ..config.method import accepted_names
    from ..models.registry import get_model_info

    path = Path(job) if job.endswith((".yaml", ".yml")) else None
    settings = dict(settings)
    section = (read_tree(path) if path is not None else {}).get("method")
    own_method = str(section.get("name", "lora") if isinstance(section, dict) else "lora").lower()
    methods = _parse_methods(settings.pop("method.name", settings.pop("method", own_method)))

    of_method = {path: value for path, value in settings.items() if path.startswith("method.")}
    # A plan needs no rows and no run folder, but a complete recipe does.
    base = {} if path is not None else {"model.name": job, "data.train": "rows.jsonl", "output_dir": output_dir}
    shared = base | {path: value for path, value in settings.items() if path not in of_method}
    if len(methods) > 1:  # of one method, load_recipe reports unknown fields better
        accepted = {name for method in methods for name in accepted_names(method)}
        for name in (path.split(".")[1] for path in of_method):
            if name not in accepted:
                raise UsageError(
                    f"none of the methods planned has a setting {name!r}{nearest(name, accepted)}",
                    f"one of {format_names(sorted(accepted))}",
                )
    recipes: dict[str, Recipe] = {}
    errors: dict[str, SlimtuneError] = {}
    for method in methods:
        names = accepted_names(method)
        taken = {p: v for p, v in of_method.items() if len(methods) == 1 or p.split(".")[1] in names}
        chosen = {} if method == own_method else {"method": {"name": method}}  # a file's settings are its own method's
        try:
            recipes[method] = load_recipe(path, {**shared, **chosen, "method.name": method, **taken})
        except UsageError as e:
            errors[method] = e
    if not recipes:
        raise errors[methods[0]]

    recipe = next(iter(recipes.values()))
    has_rows = path is not None or "data.train" in settings
    if has_rows:
        recipe.require_files()
    m, t = recipe.model, recipe.train
    model = get_model_info(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
    lengths = _read_lengths(recipe, model) if has_rows else []
    epochs = t.epochs
    if t.max_steps is not None:
        epochs = t.max_steps * t.batch_size * t.gradient_accumulation_steps / max(len(lengths), 1)
    tokens = round(epochs * sum(lengths)) or None
    return Jobs(recipes, errors, model, has_rows, lengths, tokens)


def make_plans(
    jobs: Jobs, gpu: Gpu, *, advise: bool = True, processes: int = 1
) -> tuple[list[Plan], dict[str, SlimtuneError]]:
    """Plan every run on a GPU.

    Args:
        jobs: the runs.
        gpu: where they run.
        advise: look for changes that save memory; only for a single run.
        processes: processes that train together; a plan is for one of them.

    Returns:
        The plans, and why there is none by the method's name.

    Raises:
        SlimtuneError: none can be planned.
    """
    from ..planning.planner import make_plan
    from ..planning.request import build_request

    plans: list[Plan] = []
    errors = dict(jobs.errors)
    for method, recipe in jobs.recipes.items():
        request = build_request(recipe, gpu, jobs.lengths, processes)
        print_progress(f"planning {jobs.model.name}, {method}, on {gpu.name}")
        try:
            plans.append(make_plan(request, advise=advise and len(jobs.recipes) == 1))
        except SlimtuneError as e:
            errors[method] = e
    if not plans:
        raise next(errors[method] for method in jobs.recipes)
    return plans, errors


def _parse_methods(text: Any) -> list[str]:
    """Return the methods that `lora,ia3` or `all` names, each once."""
    from ..methods import config_class, method_names

    named = [part.strip().lower() for part in str(text).split(",") if part.strip()]
    if not named:
        raise UsageError("--method names none", "methods as lora,ia3, or all")
    expanded = (name for part in named for name in (method_names() if part == "all" else (part,)))
    return list(dict.fromkeys(config_class(name).name for name in expanded))


def _read_lengths(recipe: Recipe, model: ModelInfo) -> list[int]:
    """Return the tokens of every training row; none if the tokenizer is not on this disk: a plan downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    from ..models.loader import load_tokenizer
    from ..models.registry import resolve_model
    from ..setup import load_datasets

    try:
        source = resolve_model(model.spec)
        on_disk = source.kind != "hub" or isinstance(try_to_load_from_cache(source.path, "tokenizer_config.json"), str)
    except SlimtuneError:
        on_disk = False  # only a config.json
    if not on_disk:
        error_console().print(
            f"rows are not read, the tokenizer of {model.spec} is not on this disk: every row is taken to have "
            f"{recipe.data.max_seq_len} tokens"
        )
        return []
    m = recipe.model
    how: dict[str, Any] = {"trust_remote_code": m.trust_remote_code, "revision": m.revision}
    datasets = load_datasets(recipe, load_tokenizer(model.spec, chat_template=recipe.data.chat_template, **how))
    print_progress(f"rows: {datasets.train_report.text()}")
    return datasets.train.lengths.tolist()
