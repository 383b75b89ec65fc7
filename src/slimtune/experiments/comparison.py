"""Compare fine-tuning methods or objectives: plan each run, search learning rates if asked, train, measure, report.

Finished runs are kept. The same command resumes a comparison that was killed: finished runs stand, an interrupted run
resumes from its checkpoint, a failed run is tried again.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..core.foundation.files import read_json_object, write_atomic, write_json
from ..core.foundation.formatting import format_bytes, format_duration
from ..core.foundation.remote_code import remote_code_allowed
from ..errors import RunError, SlimtuneError, UsageError
from ..evaluation.eval_result import TextOrPairEvalResult
from ..planning.plan_request import build_plan_request
from ..planning.planner import estimate_resources
from ..planning.this_machine import detect_gpu_or_cpu_spec
from .candidates import ComparisonCandidate
from .comparison_chart import write_score_cost_chart
from .comparison_report import (
    compare_gains_of_candidate_pairs,
    format_comparison_markdown,
    rank_candidates_by_finished_runs,
    require_test_evaluation,
)
from .executor_specs import make_executor
from .executors import Executor, ExecutorSpec
from .experiment_output_dir import lock_output_dir_and_write_settings, require_same_settings_and_merge_methods
from .experiment_results import CompareResult, FailedRun, LearningRateSearch, LeftOutMethod
from .method_advice import choose_best_or_cheaper_method, format_method_advice
from .run_grid import ComparisonGrid
from .run_worker import Launch, train_recipes_at_once_in_subprocess

Log = Callable[[str], None]


def run_comparison(
    grid: ComparisonGrid,
    log: Log = lambda _: None,
    *,
    plot: Path | None = None,
    executor_spec: ExecutorSpec | None = None,
) -> CompareResult:
    """Run a comparison, or what is left of it, and return what `slimtune compare --json` prints.

    After Ctrl-C finished runs stand, and those that trained have a checkpoint.

    Args:
        grid: what is compared.
        log: shows a line of progress.
        plot: an additional file for the chart (`.svg` or `.png`).
        executor_spec: where runs train at the same time (`--on`); None: here, one after another.
    """
    start = time.perf_counter()
    # Before planning; the folder is only made when something can run in it.
    require_same_settings_and_merge_methods(grid.output_dir, grid.settings(), "comparison")
    with make_executor(executor_spec, grid.output_dir) as executor:
        fitting, left_out = _plan_candidates(grid, executor, log)
        if not fitting:
            raise RunError(f"no method fits this machine: {left_out[0].why}", "at least one method that fits")
        with lock_output_dir_and_write_settings(grid.output_dir, grid.settings(), "comparison"):
            (grid.output_dir / "cells").mkdir(exist_ok=True)
            grid = dataclasses.replace(grid, candidates=tuple(fitting))
            grid, searched, failed = _search_learning_rates(grid, executor, log)
            failed += _run_cells(grid, executor, log)
            result = _build_result(
                grid,
                on=executor_spec.text if executor_spec else None,
                searched=searched,
                left_out=left_out,
                failed=failed,
                seconds=round(time.perf_counter() - start, 3),
            )
            write_json(grid.output_dir / "compare.json", result)
            write_atomic(grid.output_dir / "table.md", format_comparison_markdown(result))
            if result.methods:
                for file in filter(None, (grid.output_dir / "compare.svg", plot)):
                    write_score_cost_chart(result, file)
    return result


def _plan_candidates(
    grid: ComparisonGrid, executor: Executor, log: Log
) -> tuple[list[ComparisonCandidate], list[LeftOutMethod]]:
    """Return the candidates that fit this machine and why the others are left out; no weight is loaded.

    Those that do not fit are kept if they may train on another machine.
    """
    fitting = []
    left_out = [LeftOutMethod(method=label, why=why) for label, why in grid.excluded.items()]
    for candidate in grid.candidates:
        if all(grid.is_done(candidate, seed) for seed in grid.seeds):
            fitting.append(candidate)
            continue
        recipe = grid.build_recipe(candidate, grid.seeds[0], grid.output_dir)
        request = build_plan_request(recipe, detect_gpu_or_cpu_spec(recipe.model.device), grid.example_lengths)
        try:
            plan = estimate_resources(request, advise="none")
            verdict, reason = str(plan.verdict), plan.reason
            if verdict == "does not fit" and executor.is_remote:
                verdict = "does not fit this machine, but may fit where it trains"
            beside = executor.runs_per_device
            if beside > 1 and verdict != "does not fit" and beside * plan.need_bytes.low > plan.usable_bytes.high:
                need, usable = (
                    format_bytes(round(beside * plan.need_bytes.low)),
                    format_bytes(round(plan.usable_bytes.high)),
                )
                log(f"{candidate.label}: {beside} runs at the same time need {need} of {usable}; give a lower --on")
        except UsageError as e:  # its targets match nothing in the base
            if not candidate.from_all:
                raise
            verdict, reason = "does not fit", " ".join(e.message.split())
        except SlimtuneError as e:
            verdict, reason = "cannot be planned", e.message
        if verdict == "does not fit":
            left_out.append(LeftOutMethod(method=candidate.label, why=reason))
        else:
            log(f"plan: {candidate.label} {verdict.replace('tight', 'may fit')} ({reason})")
            fitting.append(candidate)
    for entry in left_out:
        log(f"{entry.method} is left out: {entry.why}")
    return fitting, left_out


def _search_learning_rates(
    grid: ComparisonGrid, executor: Executor, log: Log
) -> tuple[ComparisonGrid, dict[str, LearningRateSearch], list[FailedRun]]:
    """Return the grid with the rates found, the trials by candidate, and the searches that failed."""
    if not grid.trials_per_candidate:
        return grid, {}, []
    from .tuning import search_learning_rate  # optuna is optional

    candidates, searched, failed = [], {}, []
    # Candidates are searched at the same time; the trials of each follow one another, so they are the same everywhere.
    searches = [partial(search_learning_rate, grid, candidate, log, executor) for candidate in grid.candidates]
    for candidate, search in zip(grid.candidates, executor.call_all(searches), strict=True):
        if isinstance(search, RunError):
            log(f"{candidate.label}: {search.message}")
            failed.append(FailedRun(method=candidate.label, seed=None, why=search.message))
            continue
        searched[candidate.label] = search
        candidates.append(dataclasses.replace(candidate, learning_rate=search.rate, rate_source="tuned"))
    return dataclasses.replace(grid, candidates=tuple(candidates)), searched, failed


def _run_cells(grid: ComparisonGrid, executor: Executor, log: Log) -> list[FailedRun]:
    """Run every cell that is not done and return those that failed."""
    failed = []
    # All candidates of a seed (of `at_once` seeds) come first, so that early results can be compared.
    chunks = [grid.seeds[i : i + grid.at_once] for i in range(0, len(grid.seeds), grid.at_once)]
    groups = [[(candidate, seed) for seed in seeds] for seeds in chunks for candidate in grid.candidates]
    total = len(grid.seeds) * len(grid.candidates)
    started: dict[
        Path, dict[Path, tuple[str, ComparisonCandidate, int]]
    ] = {}  # the cells of a group, by its first recipe

    def start_groups() -> Iterator[tuple[Path, Launch]]:
        number = 0
        for group in groups:
            files: dict[Path, tuple[str, ComparisonCandidate, int]] = {}
            for candidate, seed in group:
                number += 1
                name = f"[{number}/{total}] {candidate.label}, seed {seed}"
                run = grid.run_dir(candidate, seed)
                if grid.is_done(candidate, seed):
                    log(f"{name}: already done")
                    continue
                log(f"{name}: {'resuming' if run.path.is_dir() else 'starting'}")
                recipe_file = run.path.with_name(f"{run.path.name}.yaml").absolute()
                write_atomic(recipe_file, grid.cell_recipe(candidate, seed).to_yaml())
                files[recipe_file] = name, candidate, seed
            if files:
                first, trust = next(iter(files)), remote_code_allowed()
                started[first] = files
                yield (
                    first,
                    partial(
                        train_recipes_at_once_in_subprocess,
                        [*files],
                        allow_faulty_rows=grid.allow_faulty_rows,
                        trust_remote_code=trust,
                    ),
                )

    for first, worker in executor.run(start_groups()):
        files = started[first]
        for recipe_file, (name, candidate, seed) in files.items():
            run = grid.run_dir(candidate, seed)
            why = worker.errors_by_recipe_file.get(str(recipe_file), worker.error)
            result, measured = {}, None
            try:
                if not why or (len(files) > 1 and grid.is_done(candidate, seed)):
                    executor.wait_for_files((run.result_file, run.evaluation_file("test")))
                    result, measured = read_json_object(run.result_file), require_test_evaluation(run)
            except RunError as e:
                why = e.message
            if measured is None:
                log(f"{name}: failed: {why}")
                failed.append(FailedRun(method=candidate.label, seed=seed, why=why))
                continue
            memory, duration = format_bytes(result["peak_bytes"]), format_duration(worker.seconds)
            costs = f"{result['trained_tokens']} tokens, {memory}, {duration}"
            costs += f" for {len(files)} runs at once" if len(files) > 1 else ""
            costs += f", killed and restarted {worker.restarts}×" if worker.restarts else ""
            preference = measured.measures.preference if isinstance(measured, TextOrPairEvalResult) else None
            gain = f", accuracy gain {preference.accuracy_gain.value:.4f}" if preference else ""
            log(f"{name}: loss reduction {measured.measures.loss_reduction.value:.4f}{gain} ({costs})")
    order: list[tuple[str, int | None]] = [(candidate.label, seed) for group in groups for candidate, seed in group]
    return sorted(failed, key=lambda f: order.index((f.method, f.seed)))


def _build_result(grid: ComparisonGrid, **how: Any) -> CompareResult:
    """Return the result of the runs that are finished; `how` are the fields that they do not give."""
    candidates = rank_candidates_by_finished_runs(grid)
    pairs = compare_gains_of_candidate_pairs(candidates)
    methods = [c.compared_method for c in candidates]
    first = methods[0] if methods else None
    model = grid.tree["model"]
    return CompareResult(
        output_dir=str(grid.output_dir),
        model=model if isinstance(model, str) else model["name"],
        dtype=first.dtype if first else None,
        device=first.device if first else None,
        tokens=grid.tokens,
        steps=grid.steps,
        seeds=list(grid.seeds),
        at_once=grid.at_once,
        rows=len(candidates[0].row_lines) if candidates else 0,
        test_tokens=sum(candidates[0].row_tokens) if candidates else 0,
        base_loss=first.base_loss if first else None,
        methods=methods,
        pairs=pairs,
        advice=format_method_advice(choose_best_or_cheaper_method(methods, pairs)),
        **how,
    )
