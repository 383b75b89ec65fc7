"""A comparison from a recipe to its table: plan every cell, search rates where asked, train and measure, report.

What is finished is kept. A killed comparison goes on with the same command: finished cells stand, an interrupted one
goes on from its checkpoint, one that failed is tried again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import RunError, SlimtuneError, UsageError
from ..planning.gpus import detect_gpu
from ..planning.planner import make_plan
from ..planning.request import build_request
from ..planning.result import Verdict
from ..run_dir import RunDir, to_json, write_atomic
from ..utils.formatting import format_bytes, format_duration
from .candidates import Candidate
from .grid import Grid
from .launch import launch
from .picture import draw
from .report import advice, lines_of, pairs_of
from .table import markdown

Say = Callable[[str], None]


def compare(grid: Grid, say: Say = lambda _: None, *, plot: Path | None = None) -> dict[str, Any]:
    """Carry a comparison out, or what is missing of it; return what `slimtune compare --json` prints.

    Args:
        grid: the cells.
        say: told what happens.
        plot: where the picture goes, too.

    Raises:
        UsageError: the folder holds another comparison or something else, or another process is at it.
        RunError: no method fits this machine, or the disk is full.
        KeyboardInterrupt: Ctrl-C; what is finished stands, and the running cell has a checkpoint.
    """
    began = time.perf_counter()
    # Looked at before the folder is made, claimed once it is known that something can run in it.
    grid.refuse_another()
    fitting, left_out = planned(grid, say)
    if not fitting:
        raise RunError(f"no method fits this machine: {left_out[0]['why']}", "at least one that does")
    whole, grid = grid, dataclasses.replace(grid, entries=fitting)
    grid.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(grid.out / ".lock", timeout=0):
            whole.claim()
            grid, searched, failed = _searched(grid, say)
            failed += _run(grid, say)
            result = {**_report(grid), "searched": searched, "left_out": left_out, "failed": failed}
            result["seconds"] = round(time.perf_counter() - began, 3)
            _write(grid.out, result, plot)
    except Timeout:
        raise UsageError(f"another slimtune compare is at work in {grid.out}", "one at a time") from None
    return result


def planned(grid: Grid, say: Say) -> tuple[tuple[Candidate, ...], list[dict[str, str]]]:
    """Return the entries that fit this machine, and why the others do not, before a weight is loaded.

    Raises:
        UsageError: the targets of a method that was named match nothing in the base.
    """
    fitting = []
    left_out = [{"method": label, "why": why} for label, why in grid.unfit.items()]
    for entry in grid.entries:
        if all(grid.done(entry, seed) for seed in grid.seeds):
            fitting.append(entry)
            continue
        try:
            verdict, why = _planned(grid, entry)
        except UsageError as e:
            if not entry.by_all:
                raise
            verdict, why = "does not fit", " ".join(e.message.split())
        if verdict == "does not fit":
            left_out.append({"method": entry.label, "why": why})
            continue
        said = {"fits": "fits", "tight": "may fit", None: "is not planned"}[verdict]
        say(f"plan: {entry.label} {said} ({why})")
        fitting.append(entry)
    for left in left_out:
        say(f"{left['method']} is left out: {left['why']}")
    return tuple(fitting), left_out


def _planned(grid: Grid, entry: Candidate) -> tuple[Verdict | None, str]:
    recipe = grid.recipe(entry, grid.seeds[0], grid.out)
    request = build_request(recipe, detect_gpu(recipe.model.device), grid.lengths)
    if entry.is_full:
        # Weights and gradients in 16 bits, masters and moments in 32: as many bytes a value as all of them in fp32.
        if request.quantization:
            return "does not fit", f"full fine-tuning cannot train weights that are kept in {request.quantization}"
        request = dataclasses.replace(request, method=None, dtype="float32")
    try:
        plan = make_plan(request, advise=False)
    except UsageError:
        raise
    except SlimtuneError as e:
        return None, e.message
    return plan.verdict, plan.reason


def _searched(grid: Grid, say: Say) -> tuple[Grid, dict[str, Any], list[dict[str, Any]]]:
    """Return the grid with the rates that were found, what was tried, and which searches failed."""
    if not grid.trials:
        return grid, {}, []
    from .tune import search

    found, searched, failed = [], {}, []
    for entry in grid.entries:
        try:
            tried = search(grid, entry, say)
        except RunError as e:
            say(f"{entry.label}: {e.message}")
            failed.append({"method": entry.label, "seed": None, "why": e.message})
            continue
        searched[entry.label] = tried
        found.append(dataclasses.replace(entry, rate=tried["rate"], rate_from="tuned"))
    return dataclasses.replace(grid, entries=tuple(found)), searched, failed


def _run(grid: Grid, say: Say) -> list[dict[str, Any]]:
    """Run the cells that are not done; return those that failed."""
    failed = []
    cells = list(grid.cells())
    for number, (entry, seed) in enumerate(cells, 1):
        name = f"[{number}/{len(cells)}] {entry.label}, seed {seed}"
        folder = grid.cell(entry, seed)
        if grid.done(entry, seed):
            say(f"{name}: done already")
            continue
        say(f"{name}: {'going on' if folder.is_dir() else 'starting'}")
        file = folder.parent / f"{folder.name}.yaml"
        write_atomic(file, grid.text(grid.cell_recipe(entry, seed), entry))
        ended = launch(file, folder.parent / f"{folder.name}.log", full=entry.is_full, force=grid.force)
        if ended.fault:
            say(f"{name}: failed: {ended.fault}")
            failed.append({"method": entry.label, "seed": seed, "why": ended.fault})
            continue
        done = RunDir(folder)
        result, measured = (json.loads(f.read_text()) for f in (done.result_file, done.evaluation_file("test")))
        say(
            f"{name}: gain {measured['loss_reduction']:.4f} ({result['trained_tokens']} tokens, "
            f"{format_bytes(result['peak_bytes'])}, {format_duration(ended.seconds)})"
        )
    return failed


def _report(grid: Grid) -> dict[str, Any]:
    lines = lines_of(grid)
    pairs = pairs_of(lines)
    said = advice(lines, pairs)
    first: Mapping[str, Any] = lines[0] if lines else {}
    return {
        "out": str(grid.out),
        "model": grid.tree["model"]["name"] if isinstance(grid.tree["model"], Mapping) else grid.tree["model"],
        "dtype": first.get("dtype"),
        "device": first.get("device"),
        "tokens": grid.tokens,
        "steps": grid.steps,
        "seeds": list(grid.seeds),
        "rows": len(first.get("_rows", [])),
        "test_tokens": sum(first.get("_tokens", [])),
        "base_loss": first.get("base_loss"),
        "methods": [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines],
        "pairs": pairs,
        "advice": said,
    }


def _write(out: Path, result: Mapping[str, Any], plot: Path | None) -> None:
    write_atomic(out / "compare.json", to_json(result, indent=2) + "\n")
    write_atomic(out / "table.md", markdown(result))
    pictures: Sequence[Path] = [out / "compare.svg", *([plot] if plot is not None else [])]
    for path in pictures if result["methods"] else []:
        draw(result, path)
