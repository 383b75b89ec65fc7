"""`slimtune choose`: which machine to buy or to rent for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from ..utils.formatting import format_count
from .common import Json, NegativeResult, console, print_age, print_fields, table
from .jobs import JOB, JOB_SETTINGS, load_one_job, make_plans
from .machines import (
    format_dollars,
    format_hours_range,
    format_short,
    list_machine_dates,
    list_machine_sources,
    read_kinds,
)
from .options import recipe_flags
from .plan import MILLION, format_rate

if TYPE_CHECKING:
    from ..planning.machines import Machine

KINDS = ("desktop", "laptop", "workstation", "mac", "mini", "rent")
SHOWN = 5


@recipe_flags(*JOB_SETTINGS)
def choose(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    budget: Annotated[
        float | None, Option(min=0, help="Dollars at most: for the machine; to rent, for the run.")
    ] = None,
    hours: Annotated[float | None, Option(min=0, help="Hours at most that the run may take.")] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="Tokens of the run, over all epochs. Default: the rows', else a million.")
    ] = None,
    kind: Annotated[str | None, Option(metavar="KINDS", help=f"Parted by commas, of {', '.join(KINDS)}.")] = None,
    kwh_price: Annotated[float | None, Option(min=0, help="Dollars for a kWh, to show the run's electricity.")] = None,
    sources: Annotated[bool, Option("--sources", help="Also show where each figure is from, and when.")] = False,
    as_json: Json = False,
) -> Any:
    """Rank the machines that a run fits on: to buy, and to rent for the run.

    The first is the cheapest that surely fits and is surely in time. Exit code 1 if there is none.
    """
    kinds = read_kinds(kind, KINDS)
    # Each row goes alone through the model, so that every machine runs the same.
    jobs = load_one_job(job, {"train.max_tokens_per_micro_batch": 1, **settings})
    from ..planning.gpus import all_gpus, measured_gpu
    from ..planning.machines import describe_machine, rank_machines
    from ..planning.planner import judge_memory
    from ..planning.throughput import estimate_speed, prices
    from .gpus import plan_key

    count = tokens or jobs.tokens or MILLION
    cards = [c for c in all_gpus() if c.trains and (c.kind in kinds or ("rent" in kinds and prices(c.name)))]
    largest = {plan_key(card, jobs): card for card in sorted(cards, key=lambda c: c.memory)}
    plans = {key: make_plans(jobs, card, advise=False)[0][0] for key, card in largest.items()}
    machines = []
    for card in cards:
        plan = plans[plan_key(card, jobs)]
        speed = estimate_speed(plan.work, card) if plan.work is not None else plan.tokens_per_second
        verdict = judge_memory(plan.need, card.usable)
        machines.append(
            describe_machine(card, plan, tokens=count, speed=speed, verdict=verdict, dollars_per_kwh=kwh_price or None)
        )
    here = measured_gpu()
    mine = None
    if here is not None:
        plan = make_plans(jobs, here, advise=False)[0][0]
        mine = describe_machine(here, plan, tokens=count)
    owned = [m for m in machines if m.gpu.kind in kinds]
    buy = rank_machines(owned, budget=budget, hours=hours)
    rented = [m for m in machines if prices(m.gpu.name)] if "rent" in kinds else []
    rent = rank_machines(rented, budget=budget, hours=hours, rent=True)
    picks = {"buy": buy, "rent": rent}
    if not as_json:
        screen = console()
        (recipe,) = jobs.recipes.values()
        screen.print(f"{jobs.model.name} with {recipe.method.name}, {format_count(count)} tokens, one row at a time")
        if mine is not None and here is not None and here.measured is not None:
            time = f", {format_hours_range(mine.cost.hours)}" if mine.cost is not None else ""
            screen.print(f"here: {mine.verdict}{time} ({here.measured.evidence})")
        for way, ranked in picks.items():
            if (way == "buy" and owned) or (way == "rent" and rented):
                screen.print(Text(f"\nto {way}: {_name_pick(ranked, way)}", style="bold"))
                if ranked:
                    fastest = min(ranked, key=lambda m: m.cost.hours.high if m.cost else float("inf"))
                    screen.print(f"the fastest: {fastest.gpu.name}, {_explain(fastest, way)}")
                    screen.print(_table(ranked[:SHOWN], way))
        fitting = sum(m.verdict == "fits" for m in machines)
        unpriced = sum(m.verdict == "fits" and m.price is None for m in owned)
        without = f"; of {unpriced} no price is known" if unpriced else ""
        screen.print(f"\n{fitting} of {len(machines)} machines have the memory{without}.")
        screen.print("Prices of desktop and workstation cards are without a computer around them.")
        if recipe.model.quantization is not None:
            screen.print("Whether bitsandbytes quantizes on AMD cards and Macs is not known to a plan.")
        print_age(list_machine_dates([*buy[:SHOWN], *rent[:SHOWN]]))
        if sources:
            screen.print()
            print_fields(list_machine_sources([*buy[:SHOWN], *rent[:SHOWN]]))
    result = {
        "model": jobs.model.name,
        "tokens": count,
        "here": mine.to_dict() if mine is not None else None,
        "need_bytes": {card.name: plans[key].need._asdict() for key, card in largest.items()},
        **{way: [{**m.to_dict(), "reason": _explain(m, way)} for m in ranked] for way, ranked in picks.items()},
    }
    return result if any(picks.values()) else NegativeResult(result)


def _name_pick(ranked: list[Machine], way: str) -> str:
    """Return the best and the runner-up, and why."""
    if not ranked:
        return "none has the memory within the limits; --quantization nf4 and --gradient-checkpointing need less"
    text = f"{ranked[0].gpu.name} is the cheapest that fits: {_explain(ranked[0], way)}"
    return text + (f"; then {ranked[1].gpu.name}" if len(ranked) > 1 else "")


def _explain(machine: Machine, way: str) -> str:
    amount = machine.price if way == "buy" else machine.cost.rent if machine.cost else None
    time = format_hours_range(machine.cost.hours if machine.cost else None)
    return f"{format_dollars(amount)}, the run in {time}"


def _table(ranked: list[Machine], way: str) -> Any:
    rows = []
    for m in ranked:
        cost = m.cost
        money = format_dollars(m.price) if way == "buy" else format_dollars(cost.rent if cost else None)
        kwh = format_short(cost.kwh if cost else None, "{:.2g}".format)
        power = format_dollars(m.electricity_dollars) if m.electricity_dollars else kwh
        writes = format_short(m.serving.decode if m.serving else None, format_rate)
        time = format_hours_range(cost.hours if cost else None)
        rows.append((m.gpu.name, f"{m.gpu.memory / 2**30:.0f}", money, time, power, writes))
    headings = ("price" if way == "buy" else "rent", "the run", "power" if ranked[0].electricity_dollars else "kWh")
    return table("machine", "GiB", *headings, "an 8B, t/s", rows=rows)
