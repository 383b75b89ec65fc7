"""`slimtune compare`: methods side by side on one recipe's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .common import Json, NegativeResult, console, error_console, table

PACKAGES = ("scipy", "matplotlib")


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The base, the rows and the run.")],
    methods: Annotated[
        str, typer.Option(help="Methods, as lora,dora,ia3,prefix,full; or all. See `slimtune methods`.")
    ] = "lora,dora,ia3,bottleneck,prefix,prompt,full",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method: the recipe's seed and those after it.")] = 3,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Trained tokens of a run; the recipe's own length without it.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search each method's learning rate first.")] = False,
    trials: Annotated[int, typer.Option(min=2, help="With --tune: rates tried for each method.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="The folder; the recipe's output_dir with -compare without it.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="A field of the recipe (train.batch_size=4), or of one method (dora.r=8). Repeatable.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train on data that a survey finds faulty.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture into this .svg or .png, too.")] = None,
    as_json: Json = False,
) -> Any:
    """Train several methods on the same rows with the same budget and compare them.

    The same command resumes a comparison that was killed. Exit code 1: a run failed; the others are reported.
    """
    _require_packages(tune)
    from ..comparison.candidates import build_candidates, split_settings
    from ..comparison.compare import compare as run_comparison
    from ..comparison.grid import build_grid
    from ..config.loading import read_override, read_tree, set_field
    from ..planning.bars import require_plot

    if plot is not None:
        plot = require_plot(plot)
    screen = error_console()

    def say(text: str) -> None:
        screen.print(text, markup=False)

    tree = read_tree(recipe.expanduser())
    of_recipe, single = split_settings(read_override(text) for text in sets or [])
    for path, value in of_recipe.items():
        set_field(tree, path, value)
    if not isinstance(tree.get("method", {}), Mapping) or not isinstance(tree.get("train") or {}, Mapping):
        raise UsageError(f"{recipe}: method and train are sections", "a mapping each")
    wanted = build_candidates([n.strip() for n in methods.split(",") if n.strip()], tree, single)
    if (rate := (tree.get("train") or {}).get("learning_rate")) is not None:
        say(f"the recipe's learning rate, {rate}, is not used: each method has its own, which --tune searches")
    folder = out if out is not None else Path(f"{tree.get('output_dir', 'runs/run')}-compare")
    how: dict[str, Any] = {"seeds": seeds, "tokens": tokens, "trials": trials if tune else 0, "force": force}
    grid = build_grid(tree, wanted, output_dir=folder.expanduser(), **how)
    result = run_comparison(grid, say, plot=plot)
    if not as_json:
        _show(result)
    return NegativeResult(result) if result["failed"] or not result["methods"] else result


def _require_packages(tune: bool) -> None:
    import importlib.util

    lacking = [p for p in (*PACKAGES, *(["optuna"] if tune else [])) if importlib.util.find_spec(p) is None]
    if lacking:
        raise UsageError(
            f"compare needs {' and '.join(lacking)}, not installed here", hint="pip install 'slimtune[compare]'"
        )


def _show(result: Mapping[str, Any]) -> None:
    from ..comparison.report import TERMINAL_COLUMNS, describe_comparison, format_terminal_row, list_notes

    screen = console()
    screen.print(describe_comparison(result), markup=False)
    rows = table(*TERMINAL_COLUMNS)
    rows.padding = (0, 1, 0, 0)
    rows.columns[0].no_wrap = True
    rows.columns[-1].justify, rows.columns[-1].no_wrap = "left", False
    for line in result["methods"]:
        rows.add_row(*format_terminal_row(line))
    screen.print(rows)
    for note in list_notes(result):
        screen.print(note, markup=False)
    screen.print(f"\n{result['advice']}", markup=False, style="bold")
    screen.print(f"Files in {result['output_dir']}: compare.json, table.md, compare.svg", markup=False)
