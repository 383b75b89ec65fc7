"""`slimtune choose --serve`: which machine to buy or to rent to run a model on, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..core.foundation.formatting import format_bytes
from .common import NegativeVerdictResult, make_console, make_table, print_fields, print_outdated_figures_notice
from .planned_jobs import load_run_to_plan

if TYPE_CHECKING:
    from ..hardware.serving_choice import ServingChoiceResult, ServingOffer

SHOWN = 5


def choose_machine_for_serving(
    job: str,
    settings: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    serving: Mapping[str, Any],
    budget: float | None,
    min_tokens_per_second: float | None,
    sources: bool,
    as_json: bool,
) -> ServingChoiceResult | NegativeVerdictResult:
    """Show the machines that a base or a tuned model runs on, the cheapest first; return them.

    Args:
        job: base or recipe.
        settings: of the recipe, by path.
        kinds: what machines may be sold as; "rent": also rented.
        serving: engine, precision and context where they are given.
        budget: dollars to buy the machine at most.
        min_tokens_per_second: that it surely writes.
        sources: also show where figures are from.
        as_json: show nothing.
    """
    from ..hardware.machine_choice import is_only_macbooks, is_sold_as, list_offered_gpus
    from ..hardware.serving_choice import (
        ServingChoiceResult,
        find_binding_serving_limits,
        make_serving_offers,
        rank_serving_machines_by_price,
    )

    jobs = load_run_to_plan(job, settings)
    gpus = [g for g in list_offered_gpus(kinds) if serving.get("engine") != "mlx" or g.vendor == "apple"]
    only_macbook = is_only_macbooks(kinds)
    offers = list(make_serving_offers(jobs.base_config.config, gpus, only_macbook=only_macbook, **serving))
    ways = {
        "buy": [offer for gpu, offer in zip(gpus, offers, strict=True) if is_sold_as(gpu, kinds)],
        "rent": [offer for offer in offers if "rent" in kinds and offer.rent_per_hour is not None],
    }
    limits: dict[str, Any] = {"budget": budget, "min_tokens_per_second": min_tokens_per_second}
    picks = {way: rank_serving_machines_by_price(some, by_rent=way == "rent", **limits) for way, some in ways.items()}
    result = ServingChoiceResult(
        model=jobs.base_config.name,
        buy=picks["buy"],
        rent=picks["rent"],
        binding_limits={
            way: find_binding_serving_limits(some, by_rent=way == "rent", **limits) for way, some in ways.items()
        },
        considered=len(offers),
        fitting=sum(offer.serve.verdict == "fits" for offer in offers),
    )
    if not as_json:
        _print_choice(result, ways, sources=sources)
    return result if any(picks.values()) else NegativeVerdictResult(result)


def _print_choice(result: ServingChoiceResult, ways: Mapping[str, list[ServingOffer]], *, sources: bool) -> None:
    from ..hardware.machine_choice import list_offer_figure_dates, list_offer_figure_sources

    screen = make_console()
    some = next((offer.serve for offers in ways.values() for offer in offers), None)
    if some is not None:
        how = f"{some.engine} in {some.precision}, {some.context} tokens of context, one request at a time"
        screen.print(f"{result.model} served by {how}")
    shown = []
    for way, offers in ways.items():
        ranked = result.buy if way == "buy" else result.rent
        if offers and not ranked:
            why = _explain_no_pick(result.binding_limits[way], offers, by_rent=way == "rent")
            screen.print(Text(f"\nto {way}: none {why}", style="bold"))
        elif ranked:
            screen.print(Text(f"\nto {way}: {_name_pick(ranked, by_rent=way == 'rent')}", style="bold"))
            fastest = _find_fastest(ranked)
            screen.print(f"the fastest: {fastest.machine.gpu}, {_describe_offer(fastest, by_rent=way == 'rent')}")
            screen.print(_offers_table(ranked[:SHOWN], by_rent=way == "rent"))
            shown += [offer.machine for offer in ranked[:SHOWN]]
    screen.print(f"\n{result.fitting} of {result.considered} machines have the memory.")
    screen.print("Prices of desktop and workstation cards are without a computer around them.")
    screen.print("context: of the longest request that surely fits")
    print_outdated_figures_notice(list_offer_figure_dates(shown))
    if sources:
        screen.print()
        print_fields(list_offer_figure_sources(shown))


def _find_fastest(offers: Sequence[ServingOffer]) -> ServingOffer:
    """Return the offer that surely writes most."""
    return max(offers, key=lambda o: s.low if (s := o.serve.decode_tokens_per_second) else 0.0)


def _describe_offer(offer: ServingOffer, *, by_rent: bool) -> str:
    """Return its price and how fast it writes."""
    from ..hardware.run_cost import format_dollar_range
    from ..planning.interval import format_interval_compact, format_three_digits

    speed = format_interval_compact(offer.serve.decode_tokens_per_second, format_three_digits)
    kind = " an hour" if by_rent else f" ({offer.machine.describe_price_kind()})"
    return f"{format_dollar_range(offer.get_dollars(by_rent=by_rent))}{kind}, writes {speed} tokens/s"


def _name_pick(ranked: Sequence[ServingOffer], *, by_rent: bool) -> str:
    """Return the best and the runner-up, and why."""
    best = ranked[0]
    has_screen = best.machine.draws_screen and not by_rent and best.free_bytes > 0
    room = f" and leaves {format_bytes(int(best.free_bytes))} for the screen" if has_screen else ""
    text = f"{best.machine.gpu} is the cheapest that fits{room}: {_describe_offer(best, by_rent=by_rent)}"
    return text + (f"; then {ranked[1].machine.gpu}" if len(ranked) > 1 else "")


def _explain_no_pick(limits: Sequence[str], offers: Sequence[ServingOffer], *, by_rent: bool) -> str:
    """Return which limit leaves no machine, and what would."""
    from ..hardware.serving_choice import rank_serving_machines_by_price

    if "memory" in limits:
        return "has the memory: --precision with fewer bits would help, or a smaller base"
    if "price" in limits:
        return "of those that fit has a known price and speed"
    ranked = rank_serving_machines_by_price(offers, by_rent=by_rent)
    picks = (ranked[0], _find_fastest(ranked))
    cheapest, fastest = (f"{offer.machine.gpu}, {_describe_offer(offer, by_rent=by_rent)}" for offer in picks)
    texts = {
        "budget": f"within --budget: the cheapest that fits is {cheapest}",
        "tokens_per_second": f"surely reaches --tokens-per-second: the fastest is {fastest}",
    }
    return "; and none ".join(texts[limit] for limit in limits)


def _offers_table(ranked: Sequence[ServingOffer], *, by_rent: bool) -> Any:
    from ..hardware.run_cost import format_dollar_range
    from ..planning.interval import format_interval_compact, format_three_digits

    rows = []
    for offer in ranked:
        serve, kind = offer.serve, [] if by_rent else [offer.machine.describe_price_kind()]
        speeds = (
            format_interval_compact(speed, format_three_digits)
            for speed in (serve.decode_tokens_per_second, serve.prefill_tokens_per_second)
        )
        money = format_dollar_range(offer.get_dollars(by_rent=by_rent))
        memory = f"{offer.machine.memory_bytes / 2**30:.0f}"
        rows.append((offer.machine.gpu, memory, money, *kind, *speeds, str(serve.max_context)))
    headings = ["an hour"] if by_rent else ["price", "price of"]
    return make_table("machine", "GiB", *headings, "writes, t/s", "reads, t/s", "context", rows=rows)
