"""`slimtune gpus`: the GPUs people own or rent, and which of them can train a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, format_names, nearest
from ..utils.formatting import format_bytes
from .common import Json, console, table
from .jobs import JOB_SETTINGS, Jobs, load_jobs, make_plans
from .options import recipe_flags
from .plan import format_range, run_text

if TYPE_CHECKING:
    from ..planning.gpus import Gpu
    from ..planning.result import Plan


@recipe_flags(*JOB_SETTINGS)
def gpus(
    settings: dict[str, Any],
    job: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL|RECIPE.yaml", help="Show the GPUs that can train this, smallest first."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kinds to show: desktop,laptop,workstation,datacentre,mac,mini.")
    ] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the GPUs that plans know, or those that can train a run (with the flags of `slimtune plan`)."""
    if job is None and settings:
        raise UsageError(f"{next(iter(settings))} describes a run", "a run to plan", "--for MODEL or --for RECIPE.yaml")
    cards = _select_kinds(kind)
    if job is None:
        if not as_json:
            console().print(_gpus_table(cards))
        return {"cards": [_to_dict(card) for card in cards]}

    from ..planning.planner import judge_plan

    jobs = load_jobs(job, settings)
    if len(jobs.recipes) > 1 or jobs.errors:
        raise UsageError("--for got several methods", "one run", "--method lora, or see `slimtune plan --method all`")
    plans = _plan_by_class(jobs, cards)
    verdicts = []
    for card in sorted(cards, key=lambda c: c.memory):  # those of the same memory stay in the table's order
        plan = plans[_gpu_class(card, jobs)]
        verdicts.append((card, plan, judge_plan(plan, card)))
    if not as_json:
        _print_verdicts(plans, verdicts)
    return {
        "model": jobs.model.name,
        "plans": [plan.to_dict() for plan in plans.values()],
        "cards": [{**_to_dict(c), "verdict": verdict, "need_bytes": p.need._asdict()} for c, p, verdict in verdicts],
    }


def _select_kinds(text: str | None) -> list[Gpu]:
    from ..planning.gpus import all_gpus

    known = list(dict.fromkeys(c.kind for c in all_gpus()))
    kinds = known if text is None else [part.strip().lower() for part in text.split(",")]
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                f"there are no GPUs of the kind {kind!r}{nearest(kind, known)}", f"one of {format_names(known)}"
            )
    return [c for c in all_gpus() if c.kind in kinds]


def _gpu_class(card: Gpu, jobs: Jobs) -> tuple[str, bool]:
    """Return what a plan depends on beside the memory: the kind of device, and the dtype if the GPU decides it."""
    return card.device, card.bf16 or jobs.dtype != "auto"


def _plan_by_class(jobs: Jobs, cards: Sequence[Gpu]) -> dict[tuple[str, bool], Plan]:
    """Plan the run once for each class of GPUs, on its largest."""
    largest = {_gpu_class(card, jobs): card for card in sorted(cards, key=lambda c: c.memory)}
    return {key: make_plans(jobs, card, advise=False)[0][0] for key, card in largest.items()}


def _gpus_table(cards: Sequence[Gpu]) -> Any:
    rows = table("GPU", "memory", "GB/s", "bf16", "flash", "watts", "kind", left=[6])
    for c in cards:
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


def _print_verdicts(plans: Mapping[tuple[str, bool], Plan], verdicts: Sequence[tuple[Gpu, Plan, str]]) -> None:
    screen = console()
    for (device, bf16), plan in plans.items():
        where = ("Macs" if device == "mps" else "GPUs") + ("" if bf16 else " without bf16")
        screen.print(f"{run_text(plan)} needs {format_range(*plan.need)} on {where} in {plan.dtype}")
    fitting = [(card, verdict) for card, _, verdict in verdicts if verdict != "does not fit"]
    if fitting:
        screen.print()
        rows = table("GPU", "memory", "usable", "verdict", "kind", left=[3, 4])
        for card, verdict in fitting:
            rows.add_row(card.name, format_bytes(card.memory), format_range(*card.usable), verdict, card.kind)
        screen.print(rows)
    if too_small := len(verdicts) - len(fitting):
        screen.print(f"\n{too_small} of {len(verdicts)} GPUs are too small")


def _to_dict(card: Gpu) -> dict[str, Any]:
    names = ("name", "kind", "vendor", "architecture", "bf16", "flash", "watts", "unified", "source")
    return {name: getattr(card, name) for name in names} | {
        "memory_bytes": card.memory,
        "visible_bytes": card.visible,
        "usable_bytes": dict(zip(("low", "high"), card.usable, strict=True)),
        "bytes_per_second": card.bandwidth,
        "flops": card.rates,
    }
