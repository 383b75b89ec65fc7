"""`slimtune tune`: search settings of a recipe."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .common import Json, On, console, print_progress, table
from .inputs import require_inputs, require_packages
from .options import recipe_flags

PACKAGES = ("optuna", "matplotlib")
DEFAULT_TRIALS = 20
SHOWN = 12
"""Trials that the screen shows; `table.md` has all."""


@recipe_flags()
def tune(
    settings: dict[str, Any],
    recipe: Annotated[Path, Argument(metavar="RECIPE.yaml", help="The base, the rows and the run.")],
    over: Annotated[
        list[str],
        Option(metavar="PATH=RANGE", help="A setting to search: log:1e-5..1e-2, 0..0.2 or 8,16,32. Repeatable."),
    ],
    trials: Annotated[
        int | None, Option(min=1, help=f"Trials at most. Default: {DEFAULT_TRIALS}, or no limit with --minutes.")
    ] = None,
    minutes: Annotated[float | None, Option(min=0, help="Minutes after which the search ends.")] = None,
    at_once: Annotated[int, Option(min=1, help="Trials that train at once, on one base in memory.")] = 1,
    on: On = None,
    out: Annotated[Path | None, Option(help="Folder. Default: the recipe's output_dir with -tune.")] = None,
    force: Annotated[bool, Option("--force", help="Train on faulty data.")] = False,
    plot: Annotated[Path | None, Option(help="Also draw the chart into this .svg or .png.")] = None,
    as_json: Json = False,
) -> Any:
    """Search settings of a recipe for the lowest loss on its validation rows.

    Each trial trains the recipe with other values; one that is worse than the median of the others is stopped early.
    If it is killed, the same command continues it. It writes the best recipe, ready for `slimtune train`.
    """
    from ..comparison.places import parse_place
    from ..comparison.space import check_ranges, parse_ranges
    from ..config.errors import raise_errors
    from ..config.loading import read_recipe_tree
    from ..config.recipe import apply_settings, find_errors
    from ..reporting.charts import require_figure_path

    ranges = parse_ranges(over)
    require_packages("tune", "compare", PACKAGES)
    place = None if on is None else parse_place(on)
    if plot is not None:
        plot = require_figure_path(plot)
    require_inputs(recipe, {"output_dir": "unused", **settings})
    tree = {"output_dir": "runs/run", **apply_settings(read_recipe_tree(recipe.expanduser()), settings)}
    raise_errors(find_errors(tree), str(recipe))
    # Names and values that need no torch come first: a wrong one is answered at once.
    check_ranges(ranges, lambda values: raise_errors(find_errors(apply_settings(tree, values)), "--over"))
    folder = out if out is not None else Path(f"{tree['output_dir']}-tune")

    from ..comparison.tune import tune as search

    limit = DEFAULT_TRIALS if trials is None and minutes is None else trials
    how: dict[str, Any] = {"trials": limit, "minutes": minutes, "force": force, "plot": plot, "place": place}
    how["at_once"] = at_once
    result = search(tree, ranges, folder.expanduser(), print_progress, **how)
    if not as_json:
        _print_result(result)
    return result


def _print_result(result: Mapping[str, Any]) -> None:
    from ..comparison.tune import describe_search, format_trials, list_search_notes, trial_columns

    screen = console()
    screen.print(describe_search(result))
    rows = format_trials(result)
    losses = [math.inf if t["loss"] is None else t["loss"] for t in result["trials"]]
    by_loss = [rows[i] for i in sorted(range(len(rows)), key=losses.__getitem__)]
    screen.print(table(*trial_columns(result), rows=by_loss[:SHOWN]))
    if len(rows) > SHOWN:
        screen.print(f"… and {len(rows) - SHOWN} more in table.md")
    for note in list_search_notes(result):
        screen.print(note)
    screen.print(f"files in {result['output_dir']}: best.yaml, tune.json, table.md, tune.svg")
    screen.print(f"next: slimtune train {result['best_recipe']}", soft_wrap=True)
