"""`slimtune train`: tune a base as a recipe, or flags, or both say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ModelError, RunError, UsageError
from ..utils.formatting import format_bytes, format_count, format_duration
from .common import ColumnOption, Json, SetOption, be_quiet, console, error_console, parse_column_map, table

if TYPE_CHECKING:
    from ..config import Recipe

FLAGS = {
    "model": "model.name",
    "data": "data.train",
    "validation": "data.validation",
    "method": "method.name",
    "rank": "method.rank",
    "alpha": "method.alpha",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "lr": "train.learning_rate",
    "batch_size": "train.batch_size",
    "packing": "train.packing",
    "compile": "train.compile",
    "format": "data.format",
    "train_on": "data.train_on",
    "max_seq_len": "data.max_seq_len",
    "on_overlong": "data.on_overlong",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "optimizer": "train.optimizer",
    "seed": "train.seed",
    "out": "output_dir",
    "trust_remote_code": "model.trust_remote_code",
}
"""A flag's name → the field of the recipe it sets."""


def train_run(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="A recipe; flags override it.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: an alias, a GGUF file, a folder or a Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Training rows: a file, a folder, or a dataset.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation rows, likewise.")] = None,
    method: Annotated[str | None, typer.Option(help="The method; see `slimtune methods`.")] = None,
    rank: Annotated[int | None, typer.Option(help="The method's rank, from 1.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The method's alpha; lora: 2 × rank where it is not given.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in an optimizer step.")] = None,
    packing: Annotated[
        bool | None,
        typer.Option("--packing/--no-packing", help="Lay rows in one sequence; else pad.", show_default=False),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the layers by torch.compile first.", show_default=False),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="What a row is (chat, instruction, text …), where its columns do not say."),
    ] = None,
    column: ColumnOption = None,
    train_on: Annotated[
        str | None, typer.Option(help="The turns that are learned: assistant or last_assistant.")
    ] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest row in tokens.")] = None,
    on_overlong: Annotated[
        str | None, typer.Option(help="What happens to a longer row: error, drop or truncate.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen weights: auto, float32, bfloat16, float16, float64.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Hold the base's linear layers in nf4 (4 bits) or int8; needs bitsandbytes.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, or adamw-8bit: its states in 8 bits; needs bitsandbytes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number.")] = None,
    out: Annotated[str | None, typer.Option(help="The run folder, relative to the working folder.")] = None,
    sets: SetOption = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let the base run code of its own.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if the plan says it does not fit, or on faulty data.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that lies in --out.")] = False,
    continue_from: Annotated[
        Path | None, typer.Option("--continue", metavar="ADAPTER", help="Start from this adapter's weights.")
    ] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Tune a base on your rows.

    RECIPE.yaml says how, or flags alone do (--model, --data and --out are needed), or both: flags win.
    """
    given = dict(locals())
    if resume and continue_from is not None:
        raise UsageError(
            "--resume and --continue are both given",
            "one of them: --resume goes on with the run in --out, --continue starts a new run from an adapter",
        )
    if os.environ.get("RANK", "0") != "0":
        be_quiet()
    from ..config import load_recipe
    from ..config.loading import read_override
    from ..run_dir import RunDir

    overrides = {path: given[flag] for flag, path in FLAGS.items() if given[flag] is not None}
    overrides.update(parse_column_map(column))
    overrides.update(read_override(text) for text in sets or [])
    if resume and recipe is None and "model.name" not in overrides and "output_dir" in overrides:
        recipe = Path(str(overrides["output_dir"])) / "recipe.yaml"
    if resume and recipe is not None and (recipe.parent / "checkpoints").is_dir():
        overrides.setdefault("output_dir", str(recipe.parent))  # a run's own recipe: the run lies where the recipe does
    settings = load_recipe(recipe, overrides)
    settings.require_files()
    if not resume:
        RunDir.require_free(settings.output_dir)  # refused at once, not after the base is loaded

    from ..training.train import train
    from ..utils import distributed

    result = train(settings, resume=resume, init_adapter=continue_from, planner=_planner(force), force=force)
    if not distributed.is_main_process():
        raise typer.Exit  # the first process shows it
    if not as_json:
        _show(result, settings.data)
    return dict(result)


def _planner(force: bool) -> Callable[[Recipe, Sequence[int]], dict[str, Any] | None]:
    """Return what plans a run on this machine, says it, and refuses what does not fit."""

    def ask(recipe: Recipe, lengths: Sequence[int]) -> dict[str, Any] | None:
        from ..planning.gpus import detect_gpu
        from ..planning.planner import make_plan
        from ..planning.request import build_request
        from ..utils import distributed

        screen = error_console()
        try:
            request = build_request(recipe, detect_gpu(recipe.model.device), lengths, distributed.world_size())
            plan = make_plan(request, advise=not force)
        except ModelError as e:
            screen.print(f"not planned: {e.message}", markup=False)
            return None
        screen.print(f"plan: it {plan.verdict.replace('tight', 'may fit')} ({plan.reason})", markup=False)
        if plan.verdict == "does not fit" and not force:
            best = [f"{a.change} saves {format_bytes(a.saves)} ({a.verdict})" for a in plan.advice[:4]]
            raise RunError(
                f"this run does not fit: {plan.reason}",
                "; or ".join(best),
                "change it so, or --force to try all the same",
            )
        return plan.to_dict()

    return ask


def _show(result: Mapping[str, Any], data: Any) -> None:
    rows = table("", "")
    run = result["run"]
    share = 100 * result["trainable_params"] / max(result["total_params"], 1)
    rows.add_row("steps", f"{result['steps']}")
    rows.add_row("trained tokens", f"{format_count(result['trained_tokens'])} ({result['tokens_per_second']:.0f} /s)")
    rows.add_row("training loss", _loss(result.get("train_loss")))
    rows.add_row("validation loss", _loss(result.get("validation_loss")))
    rows.add_row("trained parameters", f"{format_count(result['trainable_params'])} ({share:.2f} %)")
    rows.add_row("adapter", format_bytes(result["adapter_bytes"]))
    rows.add_row("peak memory", format_bytes(result["peak_bytes"]))
    for name in ("load", "prepare"):
        if (seconds := result.get(f"{name}_seconds")) is not None:
            rows.add_row(f"time to {name}", format_duration(seconds))
    screen = console()
    screen.print(rows)
    validated = data.validation is not None or data.validation_fraction > 0
    rows_from = "" if data.test else " --split validation" if validated else " --data held_out.jsonl"
    now = f"slimtune eval {run}{rows_from}, slimtune chat {run}"
    screen.print(f"the adapter lies in {run}/adapter; now: {now}", markup=False)


def _loss(value: float | None) -> str:
    return "none measured" if value is None else f"{value:.4f}"
