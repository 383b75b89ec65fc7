"""`slimtune gpus`: the GPUs people own or rent, and which of them can train a run."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from typer import Argument, Option

from ..core.foundation.formatting import format_bytes, format_count
from ..errors import UsageError
from .common import Json, console, print_age, print_fields, table
from .machine_commands import (
    MILLION,
    format_range,
    format_source,
    list_machine_sources,
    list_prices,
    machine_rows,
    read_kinds,
)
from .options import recipe_flags
from .plan_command import name_run
from .planned_jobs import JOB_SETTINGS, load_run_to_plan, make_plans, plan_key

MOST = 5
"""GPUs side by side on a screen of 80 columns."""
SEVERAL = "--for got several methods"
KIND_HELP = "Kinds to show, parted by commas: desktop, laptop, workstation, datacentre, mac, mini."


@recipe_flags(*JOB_SETTINGS)
def gpus(
    settings: dict[str, Any],
    names: Annotated[
        list[str] | None,
        Argument(metavar="[GPU]...", help="Show this GPU's figures and their sources, or two to five side by side."),
    ] = None,
    job: Annotated[
        str | None,
        Option("--for", metavar="MODEL|RECIPE.yaml", help="Show the GPUs that can train this, smallest first."),
    ] = None,
    kind: Annotated[str | None, Option(metavar="KINDS", help=KIND_HELP)] = None,
    kwh_price: Annotated[float | None, Option(min=0, help="Dollars for a kWh, to compare GPUs by electricity.")] = None,
    sources: Annotated[bool, Option("--sources", help="Show each GPU's source, and when it was checked.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the GPUs that plans know, compare some, or list those that can train a run (with the flags of `plan`)."""
    if job is None and settings:
        raise UsageError(f"{next(iter(settings))} describes a run", "a run to plan", "--for MODEL or --for RECIPE.yaml")
    from ..planning.gpu_specs import all_gpus, find_gpu, measured_gpu

    if names:
        if kind is not None:
            raise UsageError(f"{names[0]!r} and --kind are both given", "one of them")
        if len(names) > MOST:
            raise UsageError(f"{len(names)} GPUs to compare", f"{MOST} at most")
        found = [find_gpu(name) for name in names]
        if len(found) == 1 and job is None:
            if not as_json:
                print_fields(_describe_gpu(found[0]))
            return {"cards": [_to_dict(found[0])]}
        return _compare(found, job, settings, kwh_price, sources=sources, as_json=as_json)
    kinds = read_kinds(kind, list(dict.fromkeys(c.kind for c in all_gpus())))
    cards = [c for c in all_gpus() if c.kind in kinds]
    if kind is None and (here := measured_gpu()) is not None:
        cards.insert(0, here)
    if job is None and sources and not as_json:
        print_fields((c.name, format_source(c)) for c in cards)
    elif job is None and not as_json:
        rows = (
            (
                c.name,
                format_bytes(c.memory),
                f"{c.bandwidth / 1e9:.0f}" if c.bandwidth is not None else "-",
                "yes" if c.bf16 else "no",
                "yes" if c.flash else "no",
                f"{c.watts:.0f}" if c.watts is not None else "-",
                c.kind,
            )
            for c in cards
        )
        console().print(table("GPU", "memory", "GB/s", "bf16", "flash", "watts", "kind", left=[6], rows=rows))
        print_age(c.checked for c in cards)
    if job is None:
        return {"cards": [_to_dict(card) for card in cards]}

    jobs = load_run_to_plan(job, settings, SEVERAL, "--method lora, or see `slimtune plan --method all`")
    from ..planning.planner import judge_memory

    untrained = [c.name for c in cards if not c.trains]
    cards = sorted((c for c in cards if c.trains), key=lambda c: c.memory)
    # The run is planned once for each class of GPUs, on its smallest: there a batch is split as far as training splits
    # it where memory is short, so the need is what a GPU must have at least.
    smallest = {plan_key(card, jobs): card for card in reversed(cards)}
    plans = {key: make_plans(jobs, card, advise=False)[0][0] for key, card in smallest.items()}
    judged = [(card, plan := plans[plan_key(card, jobs)], judge_memory(plan.need, card.usable)) for card in cards]
    enough = next((card for card, _, verdict in judged if verdict == "fits"), None)
    if not as_json:
        screen = console()
        for (device, bf16), plan in plans.items():
            where = ("Macs" if device == "mps" else "GPUs") + ("" if bf16 else " without bf16")
            screen.print(f"{name_run(plan)} needs {format_range(*plan.need)} on {where} in {plan.dtype}")
        if enough is not None:
            screen.print(f"the smallest that fits: {enough.name}, {format_bytes(enough.memory)}")
        fitting = [
            (c.name, format_bytes(c.memory), format_range(*c.usable), verdict, c.kind)
            for c, _, verdict in judged
            if verdict != "does not fit"
        ]
        shown = [c for c, _, verdict in judged if verdict != "does not fit"]
        if fitting:
            screen.print()
            screen.print(table("GPU", "memory", "usable", "verdict", "kind", left=[3, 4], rows=fitting))
        if too_small := len(judged) - len(fitting):
            screen.print(f"\n{too_small} of {len(judged)} GPUs are too small")
        if untrained:
            screen.print(f"slimtune does not train on Intel GPUs: {', '.join(untrained)}")
        print_age(c.checked for c in shown)
        if sources:
            evidence = next(iter(plans.values())).evidence
            screen.print()
            print_fields([("base", evidence.get("model", "")), *((c.name, format_source(c)) for c in shown)])
            print_fields((name, text) for name, text in evidence.items() if name != "model")
    return {
        "model": jobs.model.name,
        "smallest": enough.name if enough is not None else None,
        "plans": [plan.to_dict() for plan in plans.values()],
        "cards": [{**_to_dict(c), "verdict": verdict, "need_bytes": p.need._asdict()} for c, p, verdict in judged],
    }


def _compare(
    cards: Sequence[Any], job: str | None, settings: dict[str, Any], kwh_price: float | None, *, sources: bool,
    as_json: bool,
) -> dict[str, Any]:  # fmt: skip
    """Show GPUs side by side, and what a run takes on each."""
    from ..hardware.machine_choice import describe_machine

    tokens, model = 0, None
    plans: list[Any] = [None] * len(cards)
    if job is not None:
        jobs = load_run_to_plan(job, settings, SEVERAL)
        tokens, model = jobs.tokens or MILLION, jobs.model.name
        plans = [make_plans(jobs, card, advise=False)[0][0] if card.trains else None for card in cards]
    machines = [
        describe_machine(card, plan, tokens=tokens, dollars_per_kwh=kwh_price or None)
        for card, plan in zip(cards, plans, strict=True)
    ]
    if not as_json:
        run = None if job is None else "a million tokens" if tokens == MILLION else f"{format_count(tokens)} tokens"
        screen = console()
        made = table("", *(card.name for card in cards), rows=machine_rows(machines, run))
        made.padding = (0, 1, 0, 0)
        screen.print(made)
        if any(m.price is not None for m in machines):
            screen.print("\nprices: paid ones where some were found, else at the launch; --sources shows each")
        if sources:
            screen.print()
            print_fields(list_machine_sources(machines))
    return {"model": model, "tokens": tokens or None, "machines": [machine.to_dict() for machine in machines]}


def _describe_gpu(card: Any) -> Iterator[tuple[str, str]]:
    """Yield the figures of one GPU, its prices and their sources."""
    from ..core.models.gpu_support import NO_XPU
    from ..planning.gpu_specs import format_checked

    yield "GPU", f"{card.name}, {card.kind}, {card.vendor} {card.architecture}"
    if not card.trains:
        yield "training", NO_XPU
    yield "memory", f"{format_bytes(card.memory)}, {format_range(*card.usable)} for a run"
    yield "bandwidth", f"{card.bandwidth / 1e9:.4g} GB/s"
    for dtype, rate in (card.rates or {}).items():
        yield dtype, f"{rate / 1e12:.4g} TFLOPS"
    yield "weights held in", "bfloat16" if card.bf16 else "float32, unless --dtype says otherwise"
    if card.watts is not None:
        yield "power", f"{card.watts:.0f} W"
    if card.released:
        yield "released", card.released
    yield "source", card.source
    yield "checked", format_checked(card.checked)
    yield from ((kind, f"{amount}, {source}") for kind, amount, source in list_prices(card.name))


def _to_dict(card: Any) -> dict[str, Any]:
    names = (
        "name", "kind", "released", "vendor", "architecture", "bf16", "flash", "watts", "unified", "source", "checked",
        "trains",
    )  # fmt: skip
    return {name: getattr(card, name) for name in names} | {
        "memory_bytes": card.memory,
        "visible_bytes": card.visible,
        "usable_bytes": dict(zip(("low", "high"), card.usable, strict=True)),
        "bytes_per_second": card.bandwidth,
        "flops": card.rates,
    }
