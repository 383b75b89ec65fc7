"""`slimtune compare`: methods side by side on one recipe's rows; `slimtune tune`: a search of a recipe's settings."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import UsageError
from ..experiments.executor_specs import PLACES, parse_executor_spec
from .common import Json, NegativeVerdictResult, make_console, make_table, print_progress, require_installed_packages
from .input_checks import list_missing_base_and_data_errors
from .options import add_recipe_flags
from .row_checks import require_valid_first_rows

if TYPE_CHECKING:
    from ..core.config.schema import RecipeTree
    from ..experiments.experiment_results import CompareResult, TuneResult

COMPARE_PACKAGES = ("scipy", "matplotlib")
TUNE_PACKAGES = ("optuna", "matplotlib")
METHODS = "lora,dora,ia3,bottleneck,prefix,prompt,full"
DEFAULT_TRIALS = 20
SHOWN = 12
"""Trials that the screen shows; `table.md` has all."""
RecipeFile = Annotated[Path, Argument(metavar="RECIPE.yaml", help="The base, the rows and the run.")]
On = Annotated[str | None, Option(metavar="WHERE", help=f"Train runs at the same time: {PLACES}.")]
Force = Annotated[bool, Option("--force", help="Train on faulty data.")]
Plot = Annotated[Path | None, Option(help="Also draw the chart into this .svg or .png.")]


def _require_valid_first_rows(tree: dict[str, Any]) -> None:
    from ..core.config.recipe import parse_recipe_sections

    sections = parse_recipe_sections(tree, "the recipe")
    require_valid_first_rows(sections["data"], sections["task"].build_objective())


@add_recipe_flags()
def compare_methods(
    settings: dict[str, Any],
    recipe: RecipeFile,
    methods: Annotated[
        str | None,
        Option(help=f"Methods, as lora,ia3,full; or all (`slimtune methods`). Default: {METHODS}.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None, Option(help="Instead of methods: objectives on preference pairs, as dpo,ipo,simpo,orpo,sft.")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Runs of each method: the recipe's seed and those after it.")] = 3,
    tokens: Annotated[int | None, Option(min=1, help="Trained tokens of a run. Default: the recipe's length.")] = None,
    tune: Annotated[bool, Option("--tune", help="Search each method's learning rate first.")] = False,
    trials: Annotated[int, Option(min=2, help="With --tune: learning rates tried for each method.")] = 8,
    at_once: Annotated[int, Option(min=1, help="Seeds of a method that train at once, on one base in memory.")] = 1,
    on: On = None,
    out: Annotated[Path | None, Option(help="Folder. Default: the recipe's output_dir with -compare.")] = None,
    force: Force = False,
    plot: Plot = None,
    as_json: Json = False,
) -> Any:
    """Train methods or tasks on the same rows with the same budget, and compare them.

    --set changes a setting of the recipe (train.batch_size=4), of one method (dora.r=8) or of one task (dpo.beta=0.5).
    If it is killed, the same command continues it. Exit code 1: a run failed; the others are reported.
    """
    require_installed_packages("compare", "compare", (*COMPARE_PACKAGES, *(["optuna"] if tune else [])))
    if methods is not None and tasks is not None:
        raise UsageError("--methods and --tasks together", "one of them: tasks are compared with the recipe's method")
    from ..evaluation.charts import require_figure_path
    from ..experiments.candidates import (
        build_candidates,
        expand_candidate_labels,
        split_settings_by_recipe_section,
    )

    place = None if on is None else parse_executor_spec(on)
    if plot is not None:
        plot = require_figure_path(plot)
    names = [name.strip() for name in (tasks or methods or METHODS).split(",") if name.strip()]
    recipe_settings, method_settings = split_settings_by_recipe_section(settings.items())
    expand_candidate_labels(names, method_settings, names_are_tasks=tasks is not None)
    tree = _load_checked_tree(recipe, recipe_settings)
    if tasks is None:
        _require_valid_first_rows(tree)
    from ..experiments import comparison as comparison
    from ..experiments.run_grid import build_comparison_grid

    if tasks is not None and isinstance(data := tree.get("data"), dict):
        data.setdefault("format", "preference")
    candidates = build_candidates(names, tree, method_settings, names_are_tasks=tasks is not None)
    if (rate := (tree.get("train") or {}).get("learning_rate")) is not None:
        reason = "each method has its own default, or --tune searches it"
        print_progress(f"the recipe's learning rate, {rate}, is not used: {reason}")
    folder = out if out is not None else Path(f"{tree['output_dir']}-compare")
    grid = build_comparison_grid(
        tree, candidates, output_dir=folder.expanduser(), seed_count=seeds, tokens_per_run=tokens,
        trials=trials if tune else 0, allow_faulty_rows=force, at_once=at_once,
    )  # fmt: skip
    result = comparison.run_comparison(grid, print_progress, plot=plot, executor_spec=place)
    if not as_json:
        _print_comparison(result)
    return NegativeVerdictResult(result) if result.failed or not result.methods else result


def _load_checked_tree(path: Path, overrides: dict[str, Any]) -> "RecipeTree":
    """Return a recipe file's tree with overrides, after every check; it need not say an `output_dir`."""
    from ..core.config.recipe import parse_recipe_sections
    from ..core.config.recipe_loading import expand_section_shorthand, read_recipe_tree

    tree = {"output_dir": "runs/run", **read_recipe_tree(path, overrides)}
    parse_recipe_sections(tree, str(path), extra_checks=list_missing_base_and_data_errors)
    return expand_section_shorthand(tree)


def _print_comparison(result: "CompareResult") -> None:
    from ..experiments.comparison_report import (
        describe_comparison_setup,
        list_comparison_headings,
        list_comparison_notes,
        make_terminal_row_cells,
    )

    screen = make_console()
    screen.print(describe_comparison_setup(result))
    rows = map(make_terminal_row_cells, result.methods)
    columns = list_comparison_headings(result.methods, terminal=True)
    methods = make_table(*columns, text_column_indices=[len(columns) - 1], rows=rows)
    methods.padding = (0, 1, 0, 0)
    if result.methods:
        screen.print(methods)
    for note in list_comparison_notes(result):
        screen.print(note)
    screen.print(f"\n{result.advice}", style="bold")
    screen.print(f"files in {result.output_dir}: compare.json, table.md, compare.svg")


@add_recipe_flags()
def tune_settings(
    settings: dict[str, Any],
    recipe: RecipeFile,
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
    force: Force = False,
    plot: Plot = None,
    as_json: Json = False,
) -> Any:
    """Search settings of a recipe for the lowest loss on its validation rows.

    Each trial trains the recipe with other values; one that is worse than the median of the others is stopped early.
    If it is killed, the same command continues it. It writes the best recipe, ready for `slimtune train`.
    """
    from ..core.config.recipe import parse_recipe_sections
    from ..core.config.recipe_loading import replace_recipe_values
    from ..evaluation.charts import require_figure_path
    from ..experiments.search_space import parse_setting_ranges, validate_and_mark_integer_ranges

    ranges = parse_setting_ranges(over)
    require_installed_packages("tune", "compare", TUNE_PACKAGES)
    place = None if on is None else parse_executor_spec(on)
    if plot is not None:
        plot = require_figure_path(plot)
    tree = _load_checked_tree(recipe, settings)
    _require_valid_first_rows(tree)
    # A wrong name or value is answered at once, before torch is imported.
    validate_and_mark_integer_ranges(
        ranges, lambda values: parse_recipe_sections(replace_recipe_values(tree, values), "--over")
    )
    folder = out if out is not None else Path(f"{tree['output_dir']}-tune")

    from ..experiments.tuning import run_tuning as search

    limit = DEFAULT_TRIALS if trials is None and minutes is None else trials
    result = search(
        tree, ranges, folder.expanduser(), print_progress, trials=limit, minutes=minutes, allow_faulty_rows=force,
        plot=plot, executor_spec=place, at_once=at_once,
    )  # fmt: skip
    if not as_json:
        _print_search(result)
    return result


def _print_search(result: "TuneResult") -> None:
    from ..experiments.tuning import (
        describe_best_trial_and_caveats,
        describe_search_setup,
        list_trial_table_headings,
        make_trial_table_rows,
    )

    screen = make_console()
    screen.print(describe_search_setup(result))
    rows = make_trial_table_rows(result)
    losses = [math.inf if t.loss is None else t.loss for t in result.trials]
    by_loss = [rows[i] for i in sorted(range(len(rows)), key=losses.__getitem__)]
    screen.print(make_table(*list_trial_table_headings(result), rows=by_loss[:SHOWN]))
    if len(rows) > SHOWN:
        screen.print(f"… and {len(rows) - SHOWN} more in table.md")
    for note in describe_best_trial_and_caveats(result):
        screen.print(note)
    screen.print(f"files in {result.output_dir}: best.yaml, tune.json, table.md, tune.svg")
    screen.print(f"next: slimtune train {result.best_recipe}", soft_wrap=True)
