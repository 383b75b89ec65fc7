"""`slimtune cost --serve`: what a million tokens of answers cost, here, rented, and at services."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import make_console, make_table, print_fields, print_outdated_figures_notice
from .planned_jobs import load_run_to_plan

if TYPE_CHECKING:
    from ..hardware.answer_cost import AnswerCostResult
    from ..planning.gpu_specs import GpuSpec


def compare_answer_costs(
    model_or_recipe: str,
    settings: Mapping[str, Any],
    gpu: GpuSpec,
    *,
    price: float | None,
    rent: float | None,
    kwh_price: float,
    sources: bool,
    as_json: bool,
) -> AnswerCostResult:
    """Show what a million tokens cost on a GPU, one request at a time, and at services; return it."""
    from ..hardware.answer_cost import AnswerCostResult, list_answer_prices, list_machine_answer_costs
    from ..hardware.machine_choice import count_runs_to_break_even, make_machine_offer
    from ..planning.interval import Interval
    from ..planning.serving_memory import estimate_serving_memory

    jobs = load_run_to_plan(model_or_recipe, settings)
    base = jobs.base_config.name
    served = estimate_serving_memory(jobs.base_config.config, gpu=gpu)
    decode, prefill = served.decode_tokens_per_second, served.prefill_tokens_per_second
    if decode is None or prefill is None:
        why = served.reason if served.verdict == "does not fit" else "its speed is not known"
        raise UsageError(f"{base} has no cost on {gpu.name}: {why}", "a base that fits", f"slimtune choose {base}")
    costs = list(list_machine_answer_costs(gpu, decode, prefill, kwh_price or None, rent))
    services = list(list_answer_prices(base))
    dollars = Interval(price, price) if price else make_machine_offer(gpu).price
    power = costs[0].written if kwh_price and gpu.watts is not None else None
    even = None
    if dollars and services:
        even = count_runs_to_break_even(dollars, Interval(*[services[0].dollars_written] * 2), power)
    result = AnswerCostResult(
        model=base,
        gpu=gpu.name,
        engine=served.engine,
        precision=served.precision,
        decode=decode,
        prefill=prefill,
        evidence=served.evidence["decode_tokens_per_second"],
        dollars=dollars,
        machine=costs,
        services=services,
        million_tokens_to_break_even=even,
    )
    if not as_json:
        _print_answer_costs(result, sources=sources)
    return result


def _print_answer_costs(result: AnswerCostResult, *, sources: bool) -> None:
    from ..hardware.machine_choice import list_gpu_price_and_rent_texts
    from ..hardware.run_cost import format_dollar_range, list_rent_prices
    from ..planning.gpu_specs import format_date_with_age_note
    from ..planning.interval import Interval, format_interval_compact, format_three_digits

    screen = make_console()
    speed = format_interval_compact(result.decode, format_three_digits)
    screen.print(f"{result.model} on {result.gpu}, served by {result.engine} in {result.precision}")
    screen.print(f"one request at a time: {speed} tokens/s ({result.evidence})\n")
    rows = [(c.name, format_dollar_range(c.written), format_dollar_range(c.read)) for c in result.machine]
    for s in result.services:
        written, read = (format_dollar_range(Interval(d, d)) for d in (s.dollars_written, s.dollars_read))
        rows.append((s.service, written, read))
    screen.print(make_table("", "a million written", "a million read", text_column_indices=[0], rows=rows))
    screen.print()
    if not result.services:
        screen.print("no price of a service is known for this base")
    else:
        screen.print("a service serves the base: one that takes adapters may ask more")
        screen.print(_explain_break_even(result))
    screen.print("many requests at once make a machine cheaper: vLLM answers them together")
    rents = [p.date for p in list_rent_prices(result.gpu)]
    print_outdated_figures_notice([*rents, *(s.date for s in result.services)])
    if sources:
        screen.print()
        print_fields(
            [
                *((amount, source) for _, amount, source in list_gpu_price_and_rent_texts(result.gpu)),
                *((s.service, f"{format_date_with_age_note(s.date)}: {s.source}") for s in result.services),
            ]
        )


def _explain_break_even(result: AnswerCostResult) -> str:
    from ..hardware.run_cost import format_dollar_range
    from ..planning.interval import format_interval_compact

    cheapest = result.services[0].service
    if result.dollars is None:
        return f"no break-even with {cheapest}: no price of {result.gpu} is known (--price)"
    bought = f"buying it ({format_dollar_range(result.dollars)})"
    if (even := result.million_tokens_to_break_even) is None:
        return f"{bought} is never cheaper than {cheapest}: electricity alone costs more"

    def number(millions: float) -> str:
        return "never" if millions == float("inf") else f"{float(f'{millions:.2g}'):,.0f}"

    millions_written = format_interval_compact(even.to_interval(), number)
    return f"{bought} is cheaper than {cheapest} after {millions_written} million written tokens"
