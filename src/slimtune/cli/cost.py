"""`slimtune cost`: buying a machine against renting one and against a service that fine-tunes."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from ..errors import UsageError
from ..utils.formatting import format_count
from .common import Json, console, print_age, print_fields, table
from .jobs import JOB, JOB_SETTINGS, load_one_job, make_plans
from .machines import format_dollars, format_hours_range, format_short, list_machine_dates, list_machine_sources
from .options import recipe_flags
from .plan import MILLION

KWH_PRICE = 0.17
"""Dollars of a kWh where none is given: about what a household in the United States paid in 2025."""


@recipe_flags(*JOB_SETTINGS)
def cost(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    gpu: Annotated[str, Option(help="The GPU or machine to buy or to rent.", show_default=False)],
    tokens: Annotated[
        int | None, Option(min=1, help="Tokens of the run, over all epochs. Default: the rows', else a million.")
    ] = None,
    runs: Annotated[int, Option(min=1, help="Runs in a month.")] = 10,
    price: Annotated[float | None, Option(min=0, help="Dollars to buy the machine. Default: a known price.")] = None,
    rent: Annotated[float | None, Option(min=0, help="Dollars an hour to rent it. Default: known prices.")] = None,
    kwh_price: Annotated[float, Option(min=0, help="Dollars for a kWh.")] = KWH_PRICE,
    sources: Annotated[bool, Option("--sources", help="Also show where each figure is from, and when.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Compare what a run costs: bought machine, rented machine, a service that fine-tunes."""
    from ..planning.gpus import find_gpu, format_checked, require_trains
    from ..planning.machines import WHOLE_MACHINES, api_prices, describe_machine, runs_to_break_even
    from ..planning.result import Range
    from ..planning.throughput import prices

    card = find_gpu(gpu)
    require_trains(card)
    jobs = load_one_job(job, settings)
    plan = make_plans(jobs, card, advise=False)[0][0]
    count = tokens or jobs.tokens or MILLION
    machine = describe_machine(card, plan, tokens=count, dollars_per_kwh=kwh_price or None)
    if machine.cost is None:
        why = plan.reason if plan.verdict == "does not fit" else "its speed is not known"
        raise UsageError(f"the run has no cost on {card.name}: {why}", "a run that fits", f"slimtune choose {job}")
    hours, power = machine.cost.hours, machine.cost.power
    dollars = Range(price, price) if price else machine.price
    hourly = [(f"{rent} $/h", rent)] if rent else [(p.provider, p.dollars_per_hour) for p in prices(card.name)]
    rents = [(f"rent, {name}", Range(hours.low * rate, hours.high * rate)) for name, rate in hourly]
    billions = plan.total_params / 1e9
    services = [
        (p, p.dollars_per_million * count / MILLION)
        for p in api_prices()
        if p.max_billions is None or billions <= p.max_billions
    ]
    cheapest = min((amount for _, amount in rents), key=lambda amount: amount.high, default=None)
    even = runs_to_break_even(dollars, cheapest, power) if dollars and cheapest else None
    if not as_json:
        screen = console()
        where = f"{jobs.model.name} with {plan.method} on {card.name}, {format_count(count)} tokens"
        screen.print(f"{where}: {format_hours_range(hours)}\n")

        def row(label: str, run: Range | None, before: str) -> tuple[str, str, str, str]:
            month = Range(run.low * runs, run.high * runs) if run else None
            return label, before, format_dollars(run), format_dollars(month)

        rows = [row(f"buy, electricity at {kwh_price} $/kWh", power, format_dollars(dollars))]
        rows += [row(label, amount, "0 $") for label, amount in rents]
        rows += [row(p.service, Range(amount, amount), "0 $") for p, amount in services]
        screen.print(table("", "at first", "a run", f"{runs} runs", left=[0], rows=rows))
        if even is not None:
            months = Range(even.low / runs, even.high / runs)
            screen.print(
                f"\nbuying is cheaper than the cheapest rent after {format_short(even, _format_number)} runs, "
                f"{format_short(months, _format_number)} months"
            )
        elif dollars and cheapest:
            screen.print("\nbuying is never cheaper than the cheapest rent: electricity alone costs more")
        else:
            flag = "--price" if dollars is None else "--rent"
            screen.print(f"\nno break-even: {flag} is not given, and no such price is known")
        if card.kind not in WHOLE_MACHINES:
            screen.print("the price is of the card alone, without a computer around it")
        print_age([*list_machine_dates([machine]), *(p.date for p, _ in services)])
        if sources:
            screen.print()
            print_fields(list_machine_sources([machine]))
            print_fields(
                (p.service, f"{p.dollars_per_million} $ a million tokens, {format_checked(p.date)}: {p.source}")
                for p, _ in services
            )
    return {
        "model": jobs.model.name,
        "tokens": count,
        "machine": machine.to_dict(),
        "buy": {"dollars": dollars._asdict() if dollars else None, "run": power._asdict() if power else None},
        "rent": [{"name": label, "run": amount._asdict()} for label, amount in rents],
        "services": [{**p._asdict(), "run": amount} for p, amount in services],
        "runs_to_break_even": even._asdict() if even else None,
        "runs_in_a_month": runs,
    }


def _format_number(number: float) -> str:
    """Return a number of runs or months in two digits: `1.6`, `16000`."""
    return "never" if number == float("inf") else f"{number:.2g}" if number < 10 else f"{float(f'{number:.2g}'):.0f}"
