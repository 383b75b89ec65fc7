"""`slimtune train`: train an adapter as a recipe, flags, or both say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ModelError, RunError, UsageError
from ..utils.formatting import format_bytes, format_count, format_duration
from .common import Json, console, error_console, print_fields, silence_process
from .options import recipe_flags

if TYPE_CHECKING:
    from ..config import Recipe


@recipe_flags("model", "data", "method", "train", "output_dir")
def train_run(
    settings: dict[str, Any],
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", help="A recipe; flags override it.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if the plan says it does not fit, or on faulty data.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    init_adapter: Annotated[
        Path | None, typer.Option("--init-adapter", metavar="ADAPTER", help="Start from this adapter's weights.")
    ] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Train an adapter on your rows.

    RECIPE.yaml has the settings, or flags alone do (--model, --data and --out are needed), or both: flags override.
    """
    if resume and init_adapter is not None:
        raise UsageError(
            "--resume and --init-adapter are both given",
            "one of them: --resume continues the run in --out, --init-adapter starts a new run from an adapter",
        )
    if os.environ.get("RANK", "0") != "0":
        silence_process()
    from ..config import load_recipe
    from ..run_dir import RunDir

    if resume and recipe is None and "model.name" not in settings and "output_dir" in settings:
        recipe = Path(str(settings["output_dir"])) / "recipe.yaml"
    if resume and recipe is not None and (recipe.parent / "checkpoints").is_dir():
        settings.setdefault("output_dir", str(recipe.parent))  # the run is where its own recipe is
    loaded = load_recipe(recipe, settings)
    loaded.require_files()
    if not resume:
        RunDir.require_free(loaded.output_dir)  # before the base is loaded

    from ..training.train import train
    from ..utils import distributed

    result = train(loaded, resume=resume, init_adapter=init_adapter, planner=make_planner(force), force=force)
    if not distributed.is_main_process():
        raise typer.Exit  # the first process prints the result
    if not as_json:
        _print_result(result, loaded)
    return dict(result)


def make_planner(force: bool) -> Callable[[Recipe, Sequence[int]], dict[str, Any] | None]:
    """Return a function that plans a run on this machine, prints the verdict, and refuses a run that does not fit."""

    def plan_run(recipe: Recipe, lengths: Sequence[int]) -> dict[str, Any] | None:
        from ..planning.gpus import detect_gpu
        from ..planning.planner import make_plan
        from ..planning.request import build_request
        from ..utils import distributed

        screen = error_console()
        try:
            request = build_request(recipe, detect_gpu(recipe.model.device), lengths, distributed.world_size())
            plan = make_plan(request, advise=not force)
        except ModelError as e:
            screen.print(f"not planned: {e.message}")
            return None
        screen.print(f"plan: it {plan.verdict.replace('tight', 'may fit')} ({plan.reason})")
        if plan.verdict == "does not fit" and not force:
            advice = [f"{a.change} saves {format_bytes(a.saves)} ({a.verdict})" for a in plan.advice[:4]]
            raise RunError(
                f"this run does not fit: {plan.reason}", "; or ".join(advice), "change it so, or --force to try anyway"
            )
        return plan.to_dict()

    return plan_run


def _print_result(result: Mapping[str, Any], recipe: Recipe) -> None:
    def loss(name: str) -> str:
        return "not measured" if result.get(name) is None else f"{result[name]:.4f}"

    percent = 100 * result["trainable_params"] / max(result["total_params"], 1)
    seconds = [(name, result.get(f"{name}_seconds")) for name in ("load", "prepare")]
    screen = console()
    print_fields(
        screen,
        [
            ("steps", f"{result['steps']}"),
            ("trained tokens", f"{format_count(result['trained_tokens'])} ({result['tokens_per_second']:.0f} /s)"),
            ("training loss", loss("train_loss")),
            ("validation loss", loss("validation_loss")),
            ("trained parameters", f"{format_count(result['trainable_params'])} ({percent:.2f} %)"),
            ("adapter", format_bytes(result["adapter_bytes"])),
            ("peak memory", format_bytes(result["peak_bytes"])),
            *((f"time to {name}", format_duration(value)) for name, value in seconds if value is not None),
        ],
    )
    data, run = recipe.data, result["run"]
    validated = data.validation is not None or data.validation_fraction > 0
    rows = "" if data.test else " --split validation" if validated else " --data held_out.jsonl"
    screen.print(f"adapter: {run}/adapter; next: slimtune eval {run}{rows}, slimtune chat {run}")
