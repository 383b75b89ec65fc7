"""`slimtune choose` and `cost`: which machine to buy or to rent for a run, and its price; how figures are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from ..core.foundation.formatting import format_bytes, format_count
from ..errors import UsageError, format_names, nearest
from .common import Json, NegativeResult, console, print_age, print_fields, table
from .options import recipe_flags
from .planned_jobs import JOB, JOB_SETTINGS, load_run_to_plan, make_plans, plan_key

if TYPE_CHECKING:
    from ..hardware.machine_choice import Machine
    from ..planning.gpu_specs import Gpu
    from ..planning.plan_result import Range

MILLION = 1_000_000
KINDS = ("desktop", "laptop", "workstation", "mac", "mini", "rent")
SHOWN = 5
UNPROVEN_VENDORS, MARK = ("amd", "apple"), " *"
"""Vendors of machines on which a run with a quantized base is not proven to work, and what marks them in `choose`."""
KWH_PRICE = 0.17
"""Dollars of a kWh where none is given: about what a household in the United States paid in 2025."""
Tokens = Annotated[
    int | None, Option(min=1, help="Tokens of the run, over all epochs. Default: the rows', else a million.")
]
Sources = Annotated[bool, Option("--sources", help="Also show where each figure is from, and when.")]


@recipe_flags(*JOB_SETTINGS)
def choose(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    budget: Annotated[
        float | None, Option(min=0, help="Dollars at most: for the machine; to rent, for the run.")
    ] = None,
    hours: Annotated[float | None, Option(min=0, help="Hours at most that the run may take.")] = None,
    tokens: Tokens = None,
    kind: Annotated[str | None, Option(metavar="KINDS", help=f"Parted by commas, of {', '.join(KINDS)}.")] = None,
    kwh_price: Annotated[float | None, Option(min=0, help="Dollars for a kWh, to show the run's electricity.")] = None,
    sources: Sources = False,
    as_json: Json = False,
) -> Any:
    """Rank the machines that a run fits on: to buy, and to rent for the run.

    The first is the cheapest that surely fits and is surely in time. Exit code 1 if there is none.
    """
    kinds = read_kinds(kind, KINDS)
    # Each row goes alone through the model, so that every machine runs the same.
    jobs = load_run_to_plan(job, {"train.max_tokens_per_micro_batch": 1, **settings})
    from ..hardware.machine_choice import describe_machine, rank_machines
    from ..planning.gpu_specs import all_gpus, measured_gpu
    from ..planning.planner import judge_memory
    from ..planning.throughput import estimate_speed, prices

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
        vendors = () if recipe.model.quantization is None else UNPROVEN_VENDORS
        names = {m.gpu.name: m.gpu.name + (MARK if m.gpu.vendor in vendors else "") for m in machines}
        screen.print(f"{jobs.model.name} with {recipe.method.name}, {format_count(count)} tokens, one row at a time")
        if mine is not None and here is not None and here.measured is not None:
            time = f", {format_hours_range(mine.cost.hours)}" if mine.cost is not None else ""
            screen.print(f"here: {mine.verdict}{time} ({here.measured.evidence})")
        for way, ranked in picks.items():
            if (way == "buy" and owned) or (way == "rent" and rented):
                screen.print(Text(f"\nto {way}: {_name_pick(ranked, way, names)}", style="bold"))
                if ranked:
                    fastest = min(ranked, key=lambda m: m.cost.hours.high if m.cost else float("inf"))
                    screen.print(f"the fastest: {names[fastest.gpu.name]}, {_explain(fastest, way)}")
                    screen.print(_table(ranked[:SHOWN], way, names))
        fitting = sum(m.verdict == "fits" for m in machines)
        unpriced = sum(m.verdict == "fits" and m.price is None for m in owned)
        without = f"; of {unpriced} no price is known" if unpriced else ""
        screen.print(f"\n{fitting} of {len(machines)} machines have the memory{without}.")
        screen.print("Prices of desktop and workstation cards are without a computer around them.")
        if vendors:
            screen.print(f"{MARK.strip()} Whether bitsandbytes quantizes on AMD cards and Macs is not known to a plan.")
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


def _name_pick(ranked: list[Machine], way: str, names: Mapping[str, str]) -> str:
    """Return the best and the runner-up, and why."""
    if not ranked:
        return "none has the memory within the limits; --quantization nf4 and --gradient-checkpointing need less"
    text = f"{names[ranked[0].gpu.name]} is the cheapest that fits: {_explain(ranked[0], way)}"
    return text + (f"; then {names[ranked[1].gpu.name]}" if len(ranked) > 1 else "")


def _explain(machine: Machine, way: str) -> str:
    amount = machine.price if way == "buy" else machine.cost.rent if machine.cost else None
    time = format_hours_range(machine.cost.hours if machine.cost else None)
    return f"{format_dollars(amount)}, the run in {time}"


def _table(ranked: list[Machine], way: str, names: Mapping[str, str]) -> Any:
    rows = []
    for m in ranked:
        cost = m.cost
        money = format_dollars(m.price) if way == "buy" else format_dollars(cost.rent if cost else None)
        kwh = format_short(cost.kwh if cost else None, "{:.2g}".format)
        power = format_dollars(m.electricity_dollars) if m.electricity_dollars else kwh
        writes = format_short(m.serving.decode if m.serving else None, format_three_digits)
        time = format_hours_range(cost.hours if cost else None)
        rows.append((names[m.gpu.name], f"{m.gpu.memory / 2**30:.0f}", money, time, power, writes))
    headings = ("price" if way == "buy" else "rent", "the run", "power" if ranked[0].electricity_dollars else "kWh")
    return table("machine", "GiB", *headings, "an 8B, t/s", rows=rows)


@recipe_flags(*JOB_SETTINGS)
def cost(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    gpu: Annotated[str, Option(help="The GPU or machine to buy or to rent.", show_default=False)],
    tokens: Tokens = None,
    runs: Annotated[int, Option(min=1, help="Runs in a month.")] = 10,
    price: Annotated[float | None, Option(min=0, help="Dollars to buy the machine. Default: a known price.")] = None,
    rent: Annotated[float | None, Option(min=0, help="Dollars an hour to rent it. Default: known prices.")] = None,
    kwh_price: Annotated[float, Option(min=0, help="Dollars for a kWh.")] = KWH_PRICE,
    sources: Sources = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Compare what a run costs: bought machine, rented machine, a service that fine-tunes."""
    from ..hardware.machine_choice import WHOLE_MACHINES, api_prices, describe_machine, runs_to_break_even
    from ..planning.gpu_specs import find_gpu, format_checked, require_trains
    from ..planning.plan_result import Range
    from ..planning.throughput import prices

    card = find_gpu(gpu)
    require_trains(card)
    jobs = load_run_to_plan(job, settings)
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


# --- figures, and where they are from ---------------------------------------------------------------------------------


def format_range(low: float, high: float, format_number: Callable[[float], str] = format_bytes) -> str:
    """Return a range as `17.9 to 18.6 GiB`."""
    first, last = format_number(low), format_number(high)
    if first == last:
        return last
    (number, _, unit), (last_number, _, last_unit) = first.rpartition(" "), last.rpartition(" ")
    same_unit = unit == last_unit and all(n.replace(".", "").isdigit() for n in (number, last_number))
    return f"{number if same_unit else first} to {last}"


def format_three_digits(rate: float) -> str:
    """Return a rate with three significant digits at most: `4.2`, `47`, `3270`."""
    return f"{rate:.2g}" if rate < 10 else f"{float(f'{rate:.3g}'):.0f}"


def format_short(values: Range | None, format_number: Callable[[float], str]) -> str:
    """Return a range as `92–134`, a single value once, `-` for None."""
    if values is None:
        return "-"
    first, last = (format_number(v) for v in values)
    return last if first == last else f"{first}–{last}"


def format_hours_range(hours: Range | None) -> str:
    """Return a time as `39–96 min`, `1.1–2.6 h` or `2–5 days`."""
    if hours is None:
        return "-"
    factor, unit = (60, "min") if hours.high < 2 else (1, "h") if hours.high < 72 else (1 / 24, "days")
    low, high = (f"{h * factor:.2g}" if h * factor < 10 else f"{h * factor:.0f}" for h in hours)
    return f"{high} {unit}" if low == high else f"{low}–{high} {unit}"


def format_dollars(values: Range | None) -> str:
    """Return money as `0.22 $` or `999–1300 $`."""
    text = format_short(values, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}")
    return text if text == "-" else f"{text} $"


def machine_rows(machines: Sequence[Machine], run: str | None) -> Iterator[tuple[str, ...]]:
    """Yield a label and a value for each machine; `run` names what is trained, None: nothing."""

    def row(label: str, value: Callable[[Machine], str]) -> tuple[str, ...]:
        return (label, *map(value, machines))

    yield row("kind", lambda m: m.gpu.kind)
    yield row("released", lambda m: m.gpu.released or "-")
    yield row("memory", lambda m: format_bytes(m.gpu.memory))
    yield row("bandwidth, GB/s", lambda m: f"{m.gpu.bandwidth / 1e9:.0f}" if m.gpu.bandwidth else "-")
    yield row("16 bits, TFLOPS", lambda m: _format_tflops(m.gpu))
    yield row("watts", lambda m: f"{m.gpu.watts:.0f}" if m.gpu.watts else "-")
    yield row("price", lambda m: format_dollars(m.price))
    yield row("an 8B writes, t/s", lambda m: format_short(m.serving.decode if m.serving else None, format_three_digits))
    yield row("reads, t/s", lambda m: format_short(m.serving.prefill if m.serving else None, format_three_digits))
    if run is None:
        return
    yield row("training", lambda m: m.verdict or "-")
    yield row("trains, t/s", lambda m: format_short(m.plan.tokens_per_second if m.plan else None, format_three_digits))
    yield row(run, lambda m: format_hours_range(m.cost.hours if m.cost else None))
    yield row("its rent", lambda m: format_dollars(m.cost.rent if m.cost else None))
    yield row("its kWh", lambda m: format_short(m.cost.kwh if m.cost else None, "{:.2g}".format))
    if any(m.electricity_dollars for m in machines):
        yield row("its electricity", lambda m: format_dollars(m.electricity_dollars))


def _format_tflops(gpu: Gpu) -> str:
    """Return the rate of 16-bit products: the faster one's, which a CPU has for one of the two dtypes only."""
    rate = max((gpu.rates or {}).get(dtype, 0.0) for dtype in ("float16", "bfloat16")) / 1e12
    return "-" if not rate else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def format_source(gpu: Gpu) -> str:
    """Return where the figures of a GPU are from, and when they were read there."""
    from ..planning.gpu_specs import format_checked

    return f"{gpu.source} (checked {format_checked(gpu.checked)})" if gpu.checked else gpu.source


def list_prices(gpu: str) -> Iterator[tuple[str, str, str]]:
    """Yield `price` or `rent`, the dollars, and where they are from, for each known price of a GPU."""
    from ..hardware.machine_choice import purchases
    from ..planning.gpu_specs import format_checked
    from ..planning.throughput import prices

    for p in purchases(gpu):
        yield "price", f"{p.dollars:.0f} $", f"{p.condition}, {format_checked(p.date)}: {p.source}"
    for q in prices(gpu):
        yield "rent", f"{q.dollars_per_hour} $/h", f"{q.provider}, {format_checked(q.date)}: {q.source}"


def read_kinds(text: str | None, known: Sequence[str]) -> list[str]:
    """Return the kinds of machines that a text names, parted by commas; all for None."""
    kinds = list(known) if text is None else [part.strip().lower() for part in text.split(",")]
    for unknown in (kind for kind in kinds if kind not in known):
        raise UsageError(f"there is no kind {unknown!r}{nearest(unknown, known)}", f"one of {format_names(known)}")
    return kinds


def list_machine_sources(machines: Sequence[Machine]) -> Iterator[tuple[str, str]]:
    """Yield where each figure of machines is from, and of what date."""
    for machine in machines:
        yield machine.gpu.name, format_source(machine.gpu)
        yield from ((amount, source) for _, amount, source in list_prices(machine.gpu.name))
    yield "serving", "Llama 3.1 8B in Q4_K_M behind 4096 tokens in llama.cpp; fitted to published runs"


def list_machine_dates(machines: Iterable[Machine]) -> Iterator[str]:
    """Yield the dates of what `list_machine_sources` shows; a price at the launch stays what it was."""
    from ..planning.throughput import prices

    for machine in machines:
        if machine.gpu.checked:  # not of what was measured on this machine
            yield machine.gpu.checked
        yield from (p.date for p in machine.purchases if p.condition != "launch")
        yield from (p.date for p in prices(machine.gpu.name))
