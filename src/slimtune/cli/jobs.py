"""The jobs that `slimtune plan` and `slimtune gpus --for` ask about: a base or a recipe, and flags.

Each job is the recipe that would train it, so that what is planned is what `slimtune train` runs, defaults and all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SlimtuneError, UsageError, format_names, nearest
from .common import error_console

if TYPE_CHECKING:
    from ..config import Recipe
    from ..models.registry import ModelInfo
    from ..planning.gpus import Gpu
    from ..planning.result import Plan

FULL = "full"
FLAGS = {
    "data": "data.train",
    "rank": "method.rank",
    "alpha": "method.alpha",
    "batch_size": "train.batch_size",
    "seq_len": "data.max_seq_len",
    "accumulate": "train.gradient_accumulation_steps",
    "checkpointing": "train.gradient_checkpointing",
    "offload": "train.offload_activations",
    "tile": "train.mlp_tile_size",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "optimizer": "train.optimizer",
    "packing": "train.packing",
}
"""A flag of a job → the field of the recipe it sets."""

MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", help="Methods, as lora,ia3; all; or full: every weight trains. The recipe's, else lora, without it."
    ),
]
RankOption = Annotated[int | None, typer.Option("--rank", help="The rank of methods that have one, from 1.")]
AlphaOption = Annotated[float | None, typer.Option("--alpha", help="The alpha of methods that have one.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", help="Rows in a batch.")]
LengthOption = Annotated[int | None, typer.Option("--seq-len", "--max-seq-len", help="Tokens of the longest row.")]
AccumulateOption = Annotated[int | None, typer.Option("--accumulate", help="Batches in an optimizer step.")]
OptimizerOption = Annotated[str | None, typer.Option("--optimizer", help="adamw, adamw-8bit, adamw-foreach or sgd.")]
QuantOption = Annotated[
    str | None, typer.Option("--quant", help="Hold the base's linear maps as nf4 (4 bits) or int8.")
]
CheckpointingOption = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing", help="Compute activations twice to keep fewer.", show_default=False
    ),
]
OffloadOption = Annotated[
    bool | None,
    typer.Option(
        "--offload/--no-offload", help="Keep what --checkpointing keeps in the machine's memory.", show_default=False
    ),
]
TileOption = Annotated[
    int | None, typer.Option("--tile", help="Tokens of a row that norms and feed-forwards compute at once.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Of the frozen weights: auto, float32, bfloat16, float16, float64.")
]
PackingOption = Annotated[
    bool | None,
    typer.Option("--packing/--no-packing", help="Lay rows in one sequence; else pad.", show_default=False),
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Processes that train together, one on each card of this kind.")
]
DataOption = Annotated[str | None, typer.Option("--data", help="Training rows: their longest count.")]


@dataclass(frozen=True)
class Asked:
    """The jobs that were asked for: one a method, each as the recipe that would train it.

    Args:
        recipes: by method's name; of "full" only what is not the method's counts.
        unfit: why, for methods that no recipe could be made of.
        outline: the base.
        with_data: the rows to train on were named.
        lengths: tokens of every training row; empty where no rows were read.
        tokens: of a whole run; None likewise.
        beyond: optimizer and quantization, where those given can be planned and not trained.
    """

    recipes: dict[str, Recipe]
    unfit: dict[str, SlimtuneError]
    outline: ModelInfo
    with_data: bool
    lengths: list[int]
    tokens: int | None
    beyond: dict[str, str]

    @property
    def dtype(self) -> str:
        """Of the base's weights; "auto": what the card has."""
        return next(iter(self.recipes.values())).model.dtype


def asked_for(job: str, given: Mapping[str, Any]) -> Asked:
    """Return the jobs that an argument and flags ask for.

    Args:
        job: a base, or a recipe's file.
        given: the flags by name, None where they were not given; `sets` the list of `--set`.

    Raises:
        UsageError: an unknown base, method or quantization; faults in the recipe; a setting no method has.
        ModelError: the base's config or its tokenizer cannot be read.
        DataError: the rows are faulty.
    """
    from ..config import load_recipe
    from ..config.loading import read_override, read_tree
    from ..models.quantization import KINDS as QUANTS
    from ..models.registry import get_model_info
    from ..planning.fake_quantization import KINDS
    from ..train_step.optimizer import TRAINABLE_OPTIMIZERS

    if (quantization := given["quantization"]) is not None and quantization not in KINDS:
        raise UsageError(f"--quant got {quantization!r}{nearest(quantization, KINDS)}", f"one of {format_names(KINDS)}")
    path = Path(job) if job.endswith((".yaml", ".yml")) else None
    section = (read_tree(path) if path is not None else {}).get("method")
    own = str(section.get("name", "lora") if isinstance(section, dict) else "lora").lower()

    said = {field: given[flag] for flag, field in FLAGS.items() if given[flag] is not None}
    trained = {"model.quantization": ("quantization", QUANTS), "train.optimizer": ("optimizer", TRAINABLE_OPTIMIZERS)}
    beyond = {name: said.pop(f) for f, (name, known) in trained.items() if f in said and said[f] not in known}
    said.update(read_override(text) for text in given["sets"] or [])
    names = _methods(said.pop("method.name", said.pop("method", own)) if given["method"] is None else given["method"])
    settings = {field: value for field, value in said.items() if field.startswith("method.")}
    _require_taken(settings, names)
    # What a plan does not look at must be there all the same for a recipe to be whole.
    out = f"runs/{given['write'].stem if given.get('write') else 'planned'}"
    rest = {} if path is not None else {"model.name": job, "data.train": "rows.jsonl", "output_dir": out}
    rest |= {field: value for field, value in said.items() if field not in settings}

    recipes: dict[str, Recipe] = {}
    unfit: dict[str, SlimtuneError] = {}
    for name in names:
        mine = {f: v for f, v in settings.items() if len(names) == 1 or f.split(".")[1] in _fields(name)}
        chosen = {} if name == own else {"method": {"name": name}}  # a file's settings are its own method's
        try:
            recipes[name] = load_recipe(path, {**rest, **chosen, "method.name": name, **mine})
        except UsageError as e:
            unfit[name] = e
    if not recipes:
        raise unfit[names[0]]

    recipe = next(iter(recipes.values()))
    with_data = path is not None or "data.train" in said
    if with_data:
        recipe.require_files()
    model = recipe.model
    outline = get_model_info(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    lengths = _lengths(recipe, outline) if with_data else []
    t = recipe.train
    rounds = (
        t.epochs
        if t.max_steps is None
        else t.max_steps * t.batch_size * t.gradient_accumulation_steps / max(len(lengths), 1)
    )
    return Asked(
        recipes=recipes,
        unfit=unfit,
        outline=outline,
        with_data=with_data,
        lengths=lengths,
        tokens=round(rounds * sum(lengths)) or None,
        beyond=beyond,
    )


def plans_of(asked: Asked, card: Gpu, *, processes: int = 1) -> tuple[list[Plan], dict[str, SlimtuneError]]:
    """Plan every job that was asked for on a card.

    Args:
        asked: the jobs.
        card: where they are to run.
        processes: that train together; a plan says what one of them takes.

    Returns:
        The plans, and by method's name why there is none.

    Raises:
        SlimtuneError: none can be planned.
    """
    from ..planning.planner import make_plan
    from ..planning.request import build_request

    found: list[Plan] = []
    unfit = dict(asked.unfit)
    for name, recipe in asked.recipes.items():
        request = build_request(recipe, card, asked.lengths, processes)
        if asked.beyond:
            request = dataclasses.replace(request, **asked.beyond)  # type: ignore[arg-type]
        error_console().print(f"planning {asked.outline.name}, {name}, on {card.name}", markup=False, style="dim")
        try:
            found.append(make_plan(request, advise=len(asked.recipes) == 1))
        except SlimtuneError as e:
            unfit[name] = e
    if not found:
        raise next(unfit[name] for name in asked.recipes)
    return found, unfit


def _lengths(recipe: Recipe, outline: ModelInfo) -> list[int]:
    """Return the tokens of every training row.

    Empty where the base's tokenizer is not on this disk: nothing is downloaded for a plan.
    """
    from ..models.loader import load_tokenizer
    from ..setup import load_datasets

    m, screen = recipe.model, error_console()
    if not _is_here(outline.spec):
        why = f"the tokenizer of {outline.spec} is not on this disk"
        screen.print(f"rows are not read, {why}: taken to be up to {recipe.data.max_seq_len} tokens long", markup=False)
        return []
    how: dict[str, Any] = {"trust_remote_code": m.trust_remote_code, "revision": m.revision}
    rows = load_datasets(recipe, load_tokenizer(outline.spec, chat_template=recipe.data.chat_template, **how))
    screen.print(f"rows: {rows.train_report.text()}", markup=False, style="dim")
    return rows.train.lengths.tolist()


def _is_here(spec: str) -> bool:
    """Return whether a base's tokenizer lies on this disk."""
    from huggingface_hub import try_to_load_from_cache

    from ..models.registry import resolve_model

    try:
        source = resolve_model(spec)
    except SlimtuneError:
        return False  # a config.json alone
    return source.kind != "hub" or isinstance(try_to_load_from_cache(source.path, "tokenizer_config.json"), str)


def _methods(text: Any) -> list[str]:
    """Return the methods that `lora,ia3`, `all` or `full` names, each once."""
    from ..methods import config_class, method_names

    named = [part.strip().lower() for part in str(text).split(",") if part.strip()]
    if not named:
        raise UsageError("--method names none", "methods as lora,ia3, or all, or full")
    spread = (n for part in named for n in (method_names() if part == "all" else (part,)))
    return list(dict.fromkeys(n if n == FULL else config_class(n).name for n in spread))


def _fields(name: str) -> list[str]:
    """Return the fields of a method as a recipe may spell them."""
    from ..config.method import known_fields
    from ..methods import config_class

    if name == FULL:
        return []
    cls = config_class(name)
    return [*known_fields(cls), *cls.short_names]


def _require_taken(settings: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a setting that none of the methods has; one method's recipe says it better itself."""
    if len(names) == 1 and names[0] != FULL:
        return
    taken = {f for name in names for f in _fields(name)}
    for path in settings:
        field = path.split(".")[1]
        if field not in taken:
            raise UsageError(
                f"none of the methods planned has a setting {field!r}{nearest(field, taken)}",
                f"one of {format_names(sorted(taken))}" if taken else f"no setting of a method: {FULL} has none",
            )
