"""`slimtune choose` and `cost`: which machine to buy or to rent for a run, and its price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from ..core.foundation.formatting import format_bytes, format_count
from ..errors import SlimtuneError, UsageError, format_names, suggest
from .choice_for_serving import choose_machine_for_serving
from .common import Json, NegativeVerdictResult, make_console, make_table, print_fields, print_outdated_figures_notice
from .cost_of_answers import compare_answer_costs
from .options import add_recipe_flags
from .planned_jobs import (
    JOB,
    JOB_SETTINGS,
    SERVE_CONTEXT,
    SERVE_ENGINE,
    SERVE_PRECISION,
    estimate_run_by_gpu_and_class,
    estimate_runs_collecting_errors,
    load_run_to_plan,
)

if TYPE_CHECKING:
    from ..core.config import Recipe
    from ..hardware.hardware_results import CostResult
    from ..hardware.machine_choice import MachineOffer

KINDS = ("desktop", "laptop", "workstation", "mac", "macbook", "mini", "rent")
SHOWN = 5
MARK = " *"
"""What marks a machine on which a run with a quantized base is not proven to work."""
KWH_PRICE = 0.17
"""Dollars of a kWh where none is given: about what a household in the United States paid in 2025."""
OPENAI_IS_CLOSED = """OpenAI is not compared: no new customers for fine-tuning since May 2026, no jobs from January 2027
(https://aihola.com/article/openai-ends-fine-tuning-2027)"""
Tokens = Annotated[
    int | None, Option(min=1, help="Tokens of the run, over all epochs. Default: the rows', else a million.")
]
Sources = Annotated[bool, Option("--sources", help="Also show where each figure is from, and when.")]


@add_recipe_flags(*JOB_SETTINGS)
def choose_machine(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    budget: Annotated[
        float | None, Option(min=0, help="Dollars at most: for the machine; to rent, for the run.")
    ] = None,
    hours: Annotated[float | None, Option(min=0, help="Hours at most that the run may take.")] = None,
    tokens: Tokens = None,
    kind: Annotated[str | None, Option(metavar="KINDS", help=f"Parted by commas, of {', '.join(KINDS)}.")] = None,
    kwh_price: Annotated[float | None, Option(min=0, help="Dollars for a kWh, to show the run's electricity.")] = None,
    serve: Annotated[bool, Option("--serve", help="Instead: machines to run the model on, without training.")] = False,
    engine: Annotated[str | None, SERVE_ENGINE] = None,
    precision: Annotated[str | None, SERVE_PRECISION] = None,
    context: Annotated[int | None, SERVE_CONTEXT] = None,
    tokens_per_second: Annotated[
        float | None, Option(min=0, help="With --serve: tokens a second that it surely writes.")
    ] = None,
    sources: Sources = False,
    as_json: Json = False,
) -> Any:
    """Rank the machines that a run fits on: to buy, and to rent for the run.

    The first is the cheapest that surely fits and is surely in time. Exit code 1 if there is none.
    """
    kinds = parse_machine_kinds(kind, KINDS)
    serving = {"engine": engine, "precision": precision, "context": context}
    _require_matching_flags(
        {"tokens": tokens, "hours": hours, "kwh-price": kwh_price},
        {**serving, "tokens-per-second": tokens_per_second},
        serve=serve,
    )
    if serve:
        return choose_machine_for_serving(
            job,
            settings,
            kinds,
            serving={name: value for name, value in serving.items() if value is not None},
            budget=budget,
            min_tokens_per_second=tokens_per_second,
            sources=sources,
            as_json=as_json,
        )
    # Each row goes alone through the model, so that every machine runs the same.
    jobs = load_run_to_plan(job, {"train.max_tokens_per_micro_batch": 1, **settings})
    from ..hardware.hardware_results import MILLION, ChooseResult, FittingOffer
    from ..hardware.machine_choice import (
        find_binding_limits,
        is_only_macbooks,
        is_sold_as,
        list_offered_gpus,
        make_machine_offer,
        rank_fitting_machines_by_price,
    )
    from ..hardware.run_cost import format_hours_range, list_rent_prices
    from ..planning.gpu_specs import MAX_AGE, load_this_machine_measured_gpu

    count = tokens or jobs.tokens or MILLION
    gpus = [gpu for gpu in list_offered_gpus(kinds) if gpu.trains]
    found, planned, unplanned = estimate_run_by_gpu_and_class(jobs, gpus, use_smallest_of_group=False)
    offers = [
        make_machine_offer(
            f.gpu,
            f.estimate,
            trained_tokens=count,
            speed=f.speed,
            verdict=f.verdict,
            dollars_per_kwh=kwh_price or None,
            only_macbook=is_only_macbooks(kinds),
        )
        for f in found
    ]
    here = load_this_machine_measured_gpu()
    mine = None
    if here is not None:
        with suppress(SlimtuneError):  # this machine alone cannot be planned
            mine = make_machine_offer(
                here, estimate_runs_collecting_errors(jobs, here, advise="none")[0][0], trained_tokens=count
            )
    owned = [offer for f, offer in zip(found, offers, strict=True) if is_sold_as(f.gpu, kinds)]
    rented = [offer for offer in offers if list_rent_prices(offer.gpu)] if "rent" in kinds else []
    picks = {
        "buy": rank_fitting_machines_by_price(owned, budget=budget, max_hours=hours),
        "rent": rank_fitting_machines_by_price(rented, budget=budget, max_hours=hours, by_rent=True),
    }
    limits = {
        way: find_binding_limits(some, budget=budget, max_hours=hours, by_rent=way == "rent")
        for way, some in (("buy", owned), ("rent", rented))
    }
    if not as_json:
        screen = make_console()
        (recipe,) = jobs.recipes.values()
        quantizes = recipe.model.quantization is not None
        names = {g.name: g.name + (MARK if quantizes and not g.quantization_is_proven else "") for g in gpus}
        screen.print(
            f"{jobs.base_config.name} with {recipe.method.name}, {format_count(count)} tokens, one row at a time"
        )
        if mine is not None and here is not None and here.measured is not None:
            time = f", {format_hours_range(mine.cost.hours)}" if mine.cost is not None else ""
            screen.print(f"here: {mine.verdict}{time} ({here.measured.evidence})")
        for way, ranked in picks.items():
            if (way == "buy" and owned) or (way == "rent" and rented):
                if not ranked:
                    why = _explain_no_pick(limits[way], rented if way == "rent" else owned, way, recipe, kind)
                    screen.print(Text(f"\nto {way}: none {why}", style="bold"))
                else:
                    screen.print(Text(f"\nto {way}: {_name_pick(ranked, way, names)}", style="bold"))
                    fastest = min(ranked, key=lambda m: m.cost.hours.high if m.cost else float("inf"))
                    screen.print(f"the fastest: {names[fastest.gpu]}, {fastest.explain_pick(way)}")
                    screen.print(_offers_table(ranked[:SHOWN], way, names))
        fitting = sum(offer.verdict == "fits" for offer in offers)
        unpriced = sum(offer.verdict == "fits" and offer.price is None for offer in owned)
        without = f"; of {unpriced} no price is known" if unpriced else ""
        screen.print(f"\n{fitting} of {len(offers)} machines have the memory{without}.")
        for left_out in unplanned:
            screen.print(f"{left_out}.")
        screen.print("Prices of desktop and workstation cards are without a computer around them.")
        screen.print(f"A price with a month is older than {MAX_AGE} days.")
        if quantizes:
            screen.print(f"{MARK.strip()} Whether bitsandbytes quantizes on AMD cards and Macs is not known to a plan.")
        _print_sources([*picks["buy"][:SHOWN], *picks["rent"][:SHOWN]], sources=sources)
    result = ChooseResult(
        model=jobs.base_config.name,
        tokens=count,
        here=mine,
        need_bytes={estimate.gpu: estimate.need_bytes for estimate in planned.values()},
        buy=[FittingOffer(offer, offer.explain_pick("buy")) for offer in picks["buy"]],
        rent=[FittingOffer(offer, offer.explain_pick("rent")) for offer in picks["rent"]],
        binding_limits=limits,
        unplanned=unplanned,
    )
    return result if any(picks.values()) else NegativeVerdictResult(result)


def _require_matching_flags(training: Mapping[str, Any], serving: Mapping[str, Any], *, serve: bool) -> None:
    """Refuse flags of training with --serve, and flags of serving without it."""
    wrong, what = (training, "a training run") if serve else (serving, "how the model is served")
    for flag in (name for name, value in wrong.items() if value is not None):
        raise UsageError(f"--{flag} describes {what}", hint="leave --serve out" if serve else "add --serve")


def _name_pick(ranked: list[MachineOffer], way: str, names: Mapping[str, str]) -> str:
    """Return the best and the runner-up, and why."""
    best = ranked[0]
    room = (
        f" and leaves {format_bytes(int(best.free_bytes))} for the screen"
        if best.draws_screen and best.free_bytes
        else ""
    )
    text = f"{names[best.gpu]} is the cheapest that fits{room if way == 'buy' else ''}: {best.explain_pick(way)}"
    return text + (f"; then {names[ranked[1].gpu]}" if len(ranked) > 1 else "")


def _explain_no_pick(
    limits: Sequence[str], offers: Sequence[MachineOffer], way: str, recipe: Recipe, kind: str | None
) -> str:
    """Return which limit leaves no machine, and what would."""
    from ..hardware.machine_choice import rank_fitting_machines_by_price
    from ..hardware.run_cost import format_hours_range

    if "memory" in limits:
        savings = [("--quantization nf4", recipe.model.quantization is None),
                   ("--gradient-checkpointing", not recipe.train.gradient_checkpointing)]  # fmt: skip
        left = [flag for flag, is_left in savings if is_left]
        text = f"{' and '.join(left)} would help" if left else "take a smaller base"
        return f"has the memory{f' of --kind {kind}' if kind else ''}: {text}"
    if "price" in limits:
        return "of those that fit has a known price"
    by_rent = way == "rent"
    ranked = rank_fitting_machines_by_price(offers, by_rent=by_rent)
    fastest = min(ranked, key=lambda m: m.cost.hours.high if m.cost else float("inf"))
    texts = {
        "budget": f"within --budget: the cheapest that fits is {ranked[0].gpu}, {ranked[0].explain_pick(way)}",
        "hours": f"within --hours: the fastest that fits is {fastest.gpu}, "
        f"{format_hours_range(fastest.cost.hours if fastest.cost else None)}",
    }
    return "; and none ".join(texts[limit] for limit in limits)


def _offers_table(ranked: list[MachineOffer], way: str, names: Mapping[str, str]) -> Any:
    from ..hardware.run_cost import format_dollar_range, format_hours_range
    from ..planning.interval import format_interval_compact, format_three_digits

    rows = []
    for m in ranked:
        cost = m.cost
        money = format_dollar_range(m.price) if way == "buy" else format_dollar_range(cost.rent if cost else None)
        kwh = format_interval_compact(cost.kwh if cost else None, "{:.2g}".format)
        power = format_dollar_range(m.electricity_dollars) if m.electricity_dollars else kwh
        writes = format_interval_compact(m.serving.decode if m.serving else None, format_three_digits)
        time = format_hours_range(cost.hours if cost else None)
        kind = [m.describe_price_kind()] if way == "buy" else []
        rows.append((names[m.gpu], f"{m.memory_bytes / 2**30:.0f}", money, *kind, time, power, writes))
    headings = ["price", "price of"] if way == "buy" else ["rent"]
    power_heading = "power" if ranked[0].electricity_dollars else "kWh"
    return make_table("machine", "GiB", *headings, "the run", power_heading, "8B, t/s", rows=rows)


def _print_sources(offers: Sequence[MachineOffer], dates: Iterable[str] = (), *, sources: bool) -> None:
    """Say how old the figures of machines are, beside other dates; with `sources` also where they are from."""
    from ..hardware.machine_choice import list_offer_figure_dates, list_offer_figure_sources

    print_outdated_figures_notice([*list_offer_figure_dates(offers), *dates])
    if sources:
        make_console().print()
        print_fields(list_offer_figure_sources(offers))


@add_recipe_flags(*JOB_SETTINGS)
def cost_of_training_run(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    gpu: Annotated[str, Option(help="The GPU or machine to buy or to rent.", show_default=False)],
    tokens: Tokens = None,
    runs: Annotated[int, Option(min=1, help="Runs in a month.")] = 10,
    price: Annotated[float | None, Option(min=0, help="Dollars to buy the machine. Default: a known price.")] = None,
    rent: Annotated[float | None, Option(min=0, help="Dollars an hour to rent it. Default: known prices.")] = None,
    kwh_price: Annotated[float, Option(min=0, help="Dollars for a kWh.")] = KWH_PRICE,
    serve: Annotated[
        bool, Option("--serve", help="Instead: what a million tokens of answers cost here, rented, and at services.")
    ] = False,
    sources: Sources = False,
    as_json: Json = False,
) -> Any:
    """Compare what a run costs: bought machine, rented machine, a service that fine-tunes."""
    from ..planning.gpu_specs import require_gpu_by_name

    if serve:
        return compare_answer_costs(
            job, settings, require_gpu_by_name(gpu), price=price, rent=rent, kwh_price=kwh_price, sources=sources,
            as_json=as_json,
        )  # fmt: skip
    from ..hardware.hardware_results import MILLION, CostResult, PurchaseCost, RentalProviderCost, TuningServiceCost
    from ..hardware.machine_choice import (
        WHOLE_MACHINES,
        count_runs_to_break_even,
        list_tuning_service_prices,
        make_machine_offer,
    )
    from ..hardware.run_cost import format_hours_range, list_rent_prices
    from ..planning.gpu_specs import (
        describe_other_versions,
        format_date_with_age_note,
        require_trainable_gpu,
    )
    from ..planning.interval import Interval

    spec = require_gpu_by_name(gpu)
    require_trainable_gpu(spec)
    jobs = load_run_to_plan(job, settings)
    versions = describe_other_versions(gpu)
    estimate = estimate_runs_collecting_errors(jobs, spec, advise="none")[0][0]
    count = tokens or jobs.tokens or MILLION
    machine = make_machine_offer(spec, estimate, trained_tokens=count, dollars_per_kwh=kwh_price or None)
    if machine.cost is None:
        why = estimate.reason if estimate.verdict == "does not fit" else "its speed is not known"
        raise UsageError(f"the run has no cost on {spec.name}: {why}", "a run that fits", f"slimtune choose {job}")
    hours, power = machine.cost.hours, machine.cost.power
    dollars = Interval(price, price) if price else machine.price
    hourly = (
        [(f"{rent} $/h", rent)] if rent else [(p.provider, p.dollars_per_hour) for p in list_rent_prices(spec.name)]
    )
    rents = [RentalProviderCost(f"rent, {name}", hours * rate) for name, rate in hourly]
    billions = estimate.total_params / 1e9
    services = [
        TuningServiceCost(p, p.dollars_per_million * count / MILLION)
        for p in list_tuning_service_prices()
        if p.max_billions is None or billions <= p.max_billions
    ]
    cheapest = min((r.run for r in rents), key=lambda amount: amount.high, default=None)
    even = count_runs_to_break_even(dollars, cheapest, power) if dollars and cheapest else None
    result = CostResult(
        model=jobs.base_config.name,
        tokens=count,
        machine=machine,
        buy=PurchaseCost(dollars, power),
        rent=rents,
        services=services,
        runs_to_break_even=even,
        runs_in_a_month=runs,
    )
    if not as_json:
        screen = make_console()
        where = f"{jobs.base_config.name} with {estimate.method} on {spec.name}, {format_count(count)} tokens"
        screen.print(f"{where}: {format_hours_range(hours)}\n")
        screen.print(_cost_table(result, kwh_price))
        screen.print(f"\n{_explain_break_even(result)}")
        if spec.kind not in WHOLE_MACHINES:
            screen.print("the price is of the card alone, without a computer around it")
        screen.print(OPENAI_IS_CLOSED)
        if versions:
            screen.print(versions)
        _print_sources([machine], [s.price.date for s in services], sources=sources)
        if sources:
            print_fields(
                (
                    p.service,
                    f"{p.dollars_per_million} $ a million tokens, {format_date_with_age_note(p.date)}: {p.source}",
                )
                for p in (s.price for s in services)
            )
    return result


def _cost_table(result: CostResult, kwh_price: float) -> Any:
    """Return what is paid at first, for a run, and in a month, for each way to run it."""
    from ..hardware.run_cost import format_dollar_range
    from ..planning.interval import Interval

    def row(label: str, run: Interval | None, before: str) -> tuple[str, str, str, str]:
        month = run * result.runs_in_a_month if run else None
        return label, before, format_dollar_range(run), format_dollar_range(month)

    kind = f" ({result.machine.describe_price_kind()})" if result.buy.dollars is result.machine.price else ""
    buy = f"buy{kind}, electricity at {kwh_price} $/kWh"
    rows = [row(buy, result.buy.run, format_dollar_range(result.buy.dollars))]
    rows += [row(r.name, r.run, "0 $") for r in result.rent]
    rows += [row(s.price.service, Interval(s.run, s.run), "0 $") for s in result.services]
    return make_table(
        "", "at first", "a run", f"{result.runs_in_a_month} runs a month", text_column_indices=[0], rows=rows
    )


def _explain_break_even(result: CostResult) -> str:
    from ..planning.interval import format_interval_compact

    if (even := result.runs_to_break_even) is not None:
        months = format_interval_compact(even.to_interval() * (1 / result.runs_in_a_month), _format_number)
        runs = format_interval_compact(even.to_interval(), _format_number)
        return (
            f"buying is cheaper than the cheapest rent after {runs} runs: "
            f"{months} months with {result.runs_in_a_month} a month (--runs)"
        )
    if result.buy.dollars and result.rent:
        return "buying is never cheaper than the cheapest rent: electricity alone costs more"
    flag = "--price" if result.buy.dollars is None else "--rent"
    return f"no break-even: {flag} is not given, and no such price is known"


def _format_number(number: float) -> str:
    """Return a number of runs or months in two digits: `1.6`, `16000`."""
    return "never" if number == float("inf") else f"{number:.2g}" if number < 10 else f"{float(f'{number:.2g}'):.0f}"


def parse_machine_kinds(text: str | None, known: Sequence[str]) -> list[str]:
    """Return the kinds of machines that a text names, parted by commas; all for None."""
    kinds = list(known) if text is None else [part.strip().lower() for part in text.split(",")]
    for unknown in (kind for kind in kinds if kind not in known):
        raise UsageError(f"there is no kind {unknown!r}{suggest(unknown, known)}", f"one of {format_names(known)}")
    return kinds
