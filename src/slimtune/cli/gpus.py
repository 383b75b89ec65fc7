"""`slimtune gpus`: the cards people own or rent, and which of them run a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import slimtune.cli.jobs as jobs

from ..errors import UsageError, format_names, nearest
from ..utils.formatting import format_bytes
from .common import Json, SetOption, console, table
from .plan import between, job_text

if TYPE_CHECKING:
    from ..planning.gpus import Gpu
    from ..planning.result import Plan


def gpus(
    job: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL|RECIPE.yaml", help="Show the cards that run this job, smallest first."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="These alone: desktop,laptop,workstation,datacentre,mac,mini.")
    ] = None,
    method: jobs.MethodOption = None,
    rank: jobs.RankOption = None,
    alpha: jobs.AlphaOption = None,
    batch_size: jobs.BatchOption = None,
    seq_len: jobs.LengthOption = None,
    accumulate: jobs.AccumulateOption = None,
    optimizer: jobs.OptimizerOption = None,
    quantization: jobs.QuantOption = None,
    checkpointing: jobs.CheckpointingOption = None,
    offload: jobs.OffloadOption = None,
    tile: jobs.TileOption = None,
    dtype: jobs.DtypeOption = None,
    packing: jobs.PackingOption = None,
    data: jobs.DataOption = None,
    sets: SetOption = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the cards that plans know, or those that run a job (with the job's flags, as `slimtune plan` takes them)."""
    given = dict(locals())
    stray = [name for name, value in given.items() if name not in ("job", "kind", "as_json") and value is not None]
    if job is None and stray:
        flag = "set" if stray[0] == "sets" else stray[0].replace("_", "-")
        raise UsageError(f"--{flag} says how a job runs", hint="say which job: --for MODEL")
    shown = _of_kind(kind)
    if job is None:
        if not as_json:
            console().print(_table(shown))
        return {"cards": [_told(c) for c in shown]}

    from ..planning.planner import judge_plan

    asked = jobs.asked_for(job, given)
    if len(asked.recipes) > 1 or asked.unfit:
        raise UsageError("--for got several methods", "one job", "--method lora, or see `slimtune plan --method all`")
    planned = _planned(asked, shown)
    runs = []
    for card in sorted(shown, key=lambda c: c.memory):  # those of the same memory stay as the table has them
        plan = planned[_sort(card, asked)]
        runs.append((card, plan, judge_plan(plan, card)))
    if not as_json:
        _show(planned, runs)
    return {
        "model": asked.outline.name,
        "plans": [p.to_dict() for p in planned.values()],
        "cards": [{**_told(c), "verdict": verdict, "need_bytes": p.need._asdict()} for c, p, verdict in runs],
    }


def _of_kind(text: str | None) -> list[Gpu]:
    from ..planning.gpus import all_gpus

    known = list(dict.fromkeys(c.kind for c in all_gpus()))
    kinds = known if text is None else [part.strip().lower() for part in text.split(",")]
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                f"there are no cards of the kind {kind!r}{nearest(kind, known)}", f"one of {format_names(known)}"
            )
    return [c for c in all_gpus() if c.kind in kinds]


def _sort(card: Gpu, asked: jobs.Asked) -> tuple[str, bool]:
    """Return what a plan hangs on beside the memory: the kind of device, and the dtype where the card decides it."""
    return card.device, card.bf16 or asked.dtype != "auto"


def _planned(asked: jobs.Asked, shown: Sequence[Gpu]) -> dict[tuple[str, bool], Plan]:
    """Plan the job once for each sort of card, on its largest."""
    largest = {_sort(card, asked): card for card in sorted(shown, key=lambda c: c.memory)}
    return {sort: jobs.plans_of(asked, card)[0][0] for sort, card in largest.items()}


def _table(shown: Sequence[Gpu]) -> Any:
    rows = table("card", "memory", "GB/s", "bf16", "flash", "watts", "kind")
    rows.columns[-1].justify = "left"
    for c in shown:
        rows.add_row(
            c.name,
            format_bytes(c.memory),
            f"{c.bandwidth / 1e9:.0f}" if c.bandwidth is not None else "-",
            "yes" if c.bf16 else "no",
            "yes" if c.flash else "no",
            f"{c.watts:.0f}" if c.watts is not None else "-",
            c.kind,
        )
    return rows


def _show(planned: Mapping[tuple[str, bool], Plan], runs: Sequence[tuple[Gpu, Plan, str]]) -> None:
    screen = console()
    for (device, bf16), plan in planned.items():
        where = ("Macs" if device == "mps" else "GPUs") + ("" if bf16 else " without bf16")
        screen.print(f"{job_text(plan)} needs {between(*plan.need)} on {where} in {plan.dtype}", markup=False)
    able = [(card, verdict) for card, _, verdict in runs if verdict != "does not fit"]
    if able:
        screen.print()
        rows = table("card", "memory", "usable", "verdict", "kind")
        rows.columns[3].justify = rows.columns[4].justify = "left"
        for card, verdict in able:
            rows.add_row(card.name, format_bytes(card.memory), between(*card.usable), verdict, card.kind)
        screen.print(rows)
    small = len(runs) - len(able)
    if small:
        screen.print(f"\n{small} of {len(runs)} cards are too small", markup=False)


def _told(card: Gpu) -> dict[str, Any]:
    return {
        "name": card.name,
        "kind": card.kind,
        "vendor": card.vendor,
        "architecture": card.architecture,
        "memory_bytes": card.memory,
        "visible_bytes": card.visible,
        "usable_bytes": dict(zip(("low", "high"), card.usable, strict=True)),
        "bytes_per_second": card.bandwidth,
        "flops": card.rates,
        "bf16": card.bf16,
        "flash": card.flash,
        "watts": card.watts,
        "unified": card.unified,
        "source": card.source,
    }
