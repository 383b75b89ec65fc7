"""`slimtune gpus`: the GPUs people own or rent, and which of them can train a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..core.foundation.formatting import format_bytes, format_count
from ..errors import SlimtuneError, UsageError
from .choose_command import parse_machine_kinds
from .common import Json, make_console, make_table, print_fields, print_outdated_figures_notice, print_progress
from .options import add_recipe_flags
from .plan_command import format_run_title
from .planned_jobs import (
    JOB_SETTINGS,
    RunsToPlan,
    estimate_run_by_gpu_and_class,
    estimate_runs_collecting_errors,
    load_run_to_plan,
)

if TYPE_CHECKING:
    from ..hardware.hardware_results import GpuComparisonResult, GpuVerdictsResult
    from ..planning.gpu_specs import GpuSpec

MOST = 5
"""GPUs side by side on a screen of 80 columns."""
SEVERAL, SEVERAL_HINT = "--for got several methods", "--method lora, or see `slimtune plan --method all`"
KIND_HELP = "Kinds to show, parted by commas: desktop, laptop, workstation, datacentre, mac, mini."


@add_recipe_flags(*JOB_SETTINGS)
def gpus_table(
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
) -> Any:
    """List the GPUs that plans know, compare some, or list those that can train a run (with the flags of `plan`)."""
    if job is None and settings:
        raise UsageError(f"{next(iter(settings))} describes a run", "a run to plan", "--for MODEL or --for RECIPE.yaml")
    from ..hardware.hardware_results import GpusResult
    from ..planning.gpu_specs import (
        describe_other_versions,
        list_gpu_specs,
        load_this_machine_measured_gpu,
        require_gpu_by_name,
    )

    if names:
        if kind is not None:
            raise UsageError(f"{names[0]!r} and --kind are both given", "one of them")
        if len(names) > MOST:
            raise UsageError(f"{len(names)} GPUs to compare", f"{MOST} at most")
        found = [require_gpu_by_name(name) for name in names]
        if not as_json:
            for versions in filter(None, map(describe_other_versions, names)):
                make_console().print(f"{versions}\n")
        if len(found) == 1 and job is None:
            if not as_json:
                from ..hardware.machine_choice import list_gpu_figures

                print_fields(list_gpu_figures(found[0]))
            return GpusResult([found[0].facts()])
        return _compare(found, job, settings, kwh_price, sources=sources, as_json=as_json)
    kinds = parse_machine_kinds(kind, list(dict.fromkeys(g.kind for g in list_gpu_specs())))
    shown = [g for g in list_gpu_specs() if g.kind in kinds]
    if kind is None and (here := load_this_machine_measured_gpu()) is not None:
        shown.insert(0, here)
    if job is not None:
        return _list_suited(
            shown, load_run_to_plan(job, settings, SEVERAL, SEVERAL_HINT), sources=sources, as_json=as_json
        )
    if sources and not as_json:
        print_fields((g.name, g.format_source()) for g in shown)
    elif not as_json:
        rows = (
            (
                g.name,
                format_bytes(g.memory),
                f"{g.bandwidth / 1e9:.0f}" if g.bandwidth is not None else "-",
                "yes" if g.bf16 else "no",
                "yes" if g.flash else "no",
                f"{g.watts:.0f}" if g.watts is not None else "-",
                g.kind,
            )
            for g in shown
        )
        make_console().print(
            make_table("GPU", "memory", "GB/s", "bf16", "flash", "watts", "kind", text_column_indices=[6], rows=rows)
        )
        print_outdated_figures_notice(g.checked for g in shown)
    return GpusResult([g.facts() for g in shown])


def _list_suited(gpus: Sequence[GpuSpec], jobs: RunsToPlan, *, sources: bool, as_json: bool) -> GpuVerdictsResult:
    """Show which GPUs a run fits on, the smallest first."""
    from ..hardware.hardware_results import GpuVerdictsResult, GpuWithVerdict

    untrained = [g.name for g in gpus if not g.trains]
    ordered = sorted((g for g in gpus if g.trains), key=lambda g: g.memory)
    judged, planned, unplanned = estimate_run_by_gpu_and_class(jobs, ordered, use_smallest_of_group=True)
    enough = next((j.gpu for j in judged if j.verdict == "fits"), None)
    if not as_json:
        screen = make_console()
        for group, estimate in planned.items():
            screen.print(
                f"{format_run_title(estimate)} needs {estimate.need_bytes.format()} on {group} in {estimate.dtype}"
            )
        for left_out in unplanned:
            screen.print(str(left_out))
        if enough is not None:
            screen.print(f"the smallest that fits: {enough.name}, {format_bytes(enough.memory)}")
        fitting = [j for j in judged if j.verdict != "does not fit"]
        if fitting:
            rows = ((j.gpu.name, format_bytes(j.gpu.memory), j.gpu.usable.format(), j.verdict, j.gpu.kind)
                    for j in fitting)  # fmt: skip
            screen.print()
            screen.print(
                make_table("GPU", "memory", "usable", "verdict", "kind", text_column_indices=[3, 4], rows=rows)
            )
        if too_small := len(judged) - len(fitting):
            screen.print(f"\n{too_small} of {len(judged)} GPUs are too small")
        if untrained:
            screen.print(f"slimtune does not train on Intel GPUs: {', '.join(untrained)}")
        print_outdated_figures_notice(j.gpu.checked for j in fitting)
        if sources:
            evidence = next(iter(planned.values())).evidence
            screen.print()
            base = ("base", evidence.get("model", ""))
            print_fields([base, *((j.gpu.name, j.gpu.format_source()) for j in fitting)])
            print_fields((name, text) for name, text in evidence.items() if name != "model")
    return GpuVerdictsResult(
        model=jobs.base_config.name,
        smallest=enough.name if enough is not None else None,
        plans=list(planned.values()),
        cards=[GpuWithVerdict(j.gpu.facts(), j.verdict, j.estimate.need_bytes) for j in judged],
        unplanned=unplanned,
    )


def _compare(
    gpus: Sequence[GpuSpec],
    job: str | None,
    settings: dict[str, Any],
    kwh_price: float | None,
    *,
    sources: bool,
    as_json: bool,
) -> GpuComparisonResult:
    """Show GPUs side by side, and what a run takes on each."""
    from ..hardware.hardware_results import MILLION, GpuComparisonResult
    from ..hardware.machine_choice import list_machine_comparison_rows, list_offer_figure_sources, make_machine_offer
    from ..planning.gpu_specs import MAX_AGE

    tokens, model = 0, None
    estimates: list[Any] = [None] * len(gpus)
    if job is not None:
        jobs = load_run_to_plan(job, settings, SEVERAL)
        tokens, model = jobs.tokens or MILLION, jobs.base_config.name
        for i, gpu in enumerate(gpus):
            try:
                estimates[i] = estimate_runs_collecting_errors(jobs, gpu, advise="none")[0][0] if gpu.trains else None
            except SlimtuneError as error:
                print_progress(f"the run is not planned on {gpu.name}: {error.message}")
    offers = [
        make_machine_offer(g, estimate, trained_tokens=tokens, dollars_per_kwh=kwh_price or None)
        for g, estimate in zip(gpus, estimates, strict=True)
    ]
    if not as_json:
        run = None if job is None else "a million tokens" if tokens == MILLION else f"{format_count(tokens)} tokens"
        screen = make_console()
        made = make_table("", *(g.name for g in gpus), rows=list_machine_comparison_rows(offers, run))
        made.padding = (0, 1, 0, 0)
        screen.print(made)
        if untrained := [g.name for g in gpus if not g.trains]:
            screen.print(f"\nslimtune does not train on Intel GPUs: {', '.join(untrained)}")
        if any(offer.price is not None for offer in offers):
            screen.print(f"\nstreet, list, used: prices of now; a month: older than {MAX_AGE} days (--sources)")
        if sources:
            screen.print()
            print_fields(list_offer_figure_sources(offers))
    return GpuComparisonResult(model, tokens or None, offers)
