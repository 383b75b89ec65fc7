"""`slimtune plan`: whether a run fits on a GPU, what it takes and how long, before a weight is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option

from ..core.foundation.files import write_atomic
from ..core.foundation.formatting import format_bytes, format_count
from ..errors import ModelError, UsageError
from ..evaluation.output_files import resolve_output_file
from .common import Json, NegativeVerdictResult, make_console, make_table, print_fields
from .options import add_recipe_flags
from .planned_jobs import (
    JOB,
    JOB_SETTINGS,
    SERVE_CONTEXT,
    SERVE_ENGINE,
    SERVE_PRECISION,
    RunsToPlan,
    estimate_runs_collecting_errors,
    find_smaller_base_of_run,
    load_runs_to_plan,
)

if TYPE_CHECKING:
    from ..hardware.hardware_results import PlannedRun, PlannedRunCost
    from ..planning.gpu_specs import GpuSpec
    from ..planning.plan_result import LabelledFigure, ResourceEstimate, ServingEstimate

VERDICTS = {
    "fits": "{} fits on {}",
    "tight": "{} is tight on {}, it may run out of memory",
    "does not fit": "{} does not fit on {}",
}


@add_recipe_flags("model.device", *JOB_SETTINGS)
def plan_run(
    job: Annotated[str, JOB],
    settings: dict[str, Any],
    gpus: Annotated[
        list[str] | None,
        Option("--gpu", metavar="TEXT", help="A GPU that `slimtune gpus` lists. Default: this machine."),
    ] = None,
    vram: Annotated[str | None, Option(help="A GPU of which only the memory is known, such as 24GiB.")] = None,
    processes: Annotated[int, Option(min=1, help="Processes that train together, each on such a GPU.")] = 1,
    write: Annotated[
        Path | None, Option(metavar="RECIPE.yaml", help="Write the run as a recipe; needs --data.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw the bars as .svg or .png.")] = None,
    also_serve: Annotated[bool, Option("--serve", help="Also plan serving the tuned model on the GPU.")] = False,
    engine: Annotated[str | None, SERVE_ENGINE] = None,
    precision: Annotated[str | None, SERVE_PRECISION] = None,
    context: Annotated[int | None, SERVE_CONTEXT] = None,
    price: Annotated[float | None, Option(min=0, help="Price of the GPU in dollars an hour.")] = None,
    details: Annotated[bool, Option("--details", help="Also show memory by part and every figure.")] = False,
    sources: Annotated[bool, Option("--sources", help="Also show where figures are from, and of what date.")] = False,
    as_json: Json = False,
) -> Any:
    """Say whether a run will fit, before a weight is loaded.

    Shows what it needs, what to change, and how long it takes; --details shows memory by part and every figure.
    --method takes several (lora,ia3), or all. Exit code 0 also if the run does not fit; 1 if --serve cannot be
    planned, or training beside it.
    """
    given = {"engine": engine, "precision": precision, "context": context}
    serving: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if serving and not also_serve:
        raise UsageError(f"--{next(iter(serving))} describes how the tuned model is served", hint="add --serve")
    if price == 0:
        raise UsageError("--price is 0", "dollars an hour, above 0", "leave it out to use published prices")
    if gpus is not None and len(gpus) > 1:
        raise UsageError(f"--gpu is given {len(gpus)} times: {', '.join(gpus)}", "one GPU", "plan for each by itself")
    gpu = gpus[0] if gpus else None
    if gpu is not None and vram is not None:
        raise UsageError("--gpu and --vram are both given", "one of them: --gpu names a GPU, --vram only its memory")
    if "model.device" in settings and (gpu is not None or vram is not None):
        other = "--gpu" if gpu is not None else "--vram"
        raise UsageError(f"--device and {other} are both given", "one of them: --device is one of this machine's")
    from ..evaluation.charts import require_figure_path
    from ..planning.gpu_specs import (
        describe_other_versions,
        format_date_with_age_note,
        is_date_outdated,
        make_gpu_with_memory,
        require_gpu_by_name,
        require_trainable_gpu,
    )

    spec = require_gpu_by_name(gpu) if gpu is not None else make_gpu_with_memory(vram) if vram is not None else None
    if plot is not None:
        plot = require_figure_path(plot)
    jobs = load_runs_to_plan(job, settings, output_dir=f"runs/{write.stem if write is not None else 'planned'}")
    from ..hardware.hardware_results import (
        MILLION,
        MethodPlansResult,
        PlanDetails,
        PlannedRun,
        PlanResult,
        UnplannedMethod,
    )
    from ..planning.this_machine import detect_gpu_or_cpu_spec
    from .plan_chart import make_memory_bars, write_plan_chart

    spec = spec or detect_gpu_or_cpu_spec(str(settings.get("model.device", "auto")))
    if not also_serve:
        require_trainable_gpu(spec)
    if write is not None:
        _require_writable(write, jobs)
    served, serve_error = _estimate_serving(jobs, spec, serving) if also_serve else (None, None)
    # With --serve two answers are asked for: that one of them is not known does not take the other.
    try:
        estimates, errors = estimate_runs_collecting_errors(
            jobs,
            spec,
            advise="all" if details or as_json else "first",
            processes=processes,
            raise_if_none=served is None or write is not None or plot is not None,
        )
    except ModelError as refusal:
        raise _name_plan_of_serving(refusal, jobs, spec) from refusal
    runs = [
        PlannedRun(e, _estimate_cost(e, jobs.tokens or MILLION, spec, price), *jobs.find_learning_rates(e.method))
        for e in estimates
    ]
    if len(runs) == 1 and estimates[0].verdict == "does not fit" and not estimates[0].can_be_made_to_fit:
        runs = [replace(runs[0], smaller_base=find_smaller_base_of_run(jobs, spec, processes))]
    unfit = [UnplannedMethod(method, " ".join(error.message.split())) for method, error in errors.items()]
    if write is not None:
        (recipe,) = jobs.recipes.values()
        # A plan knows names of bases that have no weights here: the recipe says where the weights are.
        model = replace(recipe.model, name=jobs.base_config.spec)
        note = f"# {_verdict_text(estimates[0])}: {estimates[0].reason}\n"
        write_atomic(write, note + replace(recipe, model=model).to_yaml())
    if plot is not None:
        write_plan_chart(estimates, plot)
    if not as_json:
        screen = make_console()
        if len(runs) > 1:
            screen.print(_estimates_table(estimates))
        for part in _render_answer(runs[0]) if len(runs) == 1 else ():
            screen.print(part)
        if gpu is not None and (versions := describe_other_versions(gpu)):
            screen.print(f"note: {versions}")
        if spec.checked and is_date_outdated(spec.checked):
            screen.print(
                f"note: figures of {spec.name} are of {format_date_with_age_note(spec.checked)}: --sources has them"
            )
        if details and len(runs) == 1:
            for part in _render_details(runs[0], spec):
                screen.print(part)
        for error in unfit:
            screen.print(f"{error.method} is not planned: {error.why}")
        if estimates and (details or len(runs) > 1):
            screen.print()
            screen.print(make_memory_bars(estimates, spec, screen))
        if estimates and sources:
            screen.print()
            print_fields(_list_sources(estimates[0], spec))
        for part in _render_serving(served) if served is not None else []:
            screen.print(part)
        if serve_error is not None:
            screen.print(f"\nserving is not planned: {serve_error}")
        if write is not None:
            screen.print(f"\nnext: slimtune train {shlex.quote(str(write))}", soft_wrap=True)
    more = PlanDetails(plans=runs, unfit=unfit, serve=served, serve_error=serve_error, plot=plot, recipe=write)
    # The fields of a single run are at the top, too.
    is_one = len(runs) == 1
    result = PlanResult(runs[0], more) if is_one else MethodPlansResult(jobs.base_config.name, spec.name, more)
    return result if runs and serve_error is None else NegativeVerdictResult(result)


def _estimate_serving(
    jobs: RunsToPlan, gpu: GpuSpec, serving: Mapping[str, Any]
) -> tuple[ServingEstimate | None, str | None]:
    """Return what serving the base takes, or why that is not known."""
    from ..planning.serving_memory import estimate_serving_memory

    try:
        return estimate_serving_memory(jobs.base_config.config, gpu=gpu, **serving), None
    except ModelError as error:
        return None, " ".join(error.message.split())


def _name_plan_of_serving(error: ModelError, jobs: RunsToPlan, gpu: GpuSpec) -> ModelError:
    """Return why no run can be planned, with the command that plans serving the base, if that can be."""
    if error.hint or _estimate_serving(jobs, gpu, {})[0] is None:
        return error
    hint = f"`slimtune plan {shlex.quote(jobs.base_config.name)} --serve` plans serving it"
    return ModelError(error.message, error.expected, hint, field=error.field, code=error.code)


def _estimate_cost(
    estimate: ResourceEstimate, tokens: int, gpu: GpuSpec, dollars_per_hour: float | None
) -> PlannedRunCost | None:
    """Return what the tokens of a run take on a GPU; None if its speed is unknown."""
    from ..hardware.hardware_results import PlannedRunCost
    from ..hardware.run_cost import estimate_run_cost

    if estimate.tokens_per_second is None:
        return None
    cost = estimate_run_cost(estimate.tokens_per_second, tokens, gpu, dollars_per_hour=dollars_per_hour)
    return PlannedRunCost(tokens, cost)


def format_run_title(estimate: ResourceEstimate) -> str:
    """Return what is planned: `llama-3.1-8b with lora`."""
    return f"{estimate.model} with {estimate.method}"


def _require_writable(path: Path, jobs: RunsToPlan) -> None:
    """Check, before anything is planned, that the run can be written as a recipe that trains."""
    if len(jobs.recipes) != 1:
        raise UsageError(f"--write got {', '.join(jobs.recipes)}", "one method", "--method lora")
    if not jobs.has_rows:
        raise UsageError("--write needs the rows that the recipe trains on", hint="--data rows.jsonl")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{str(path)!r} is not a name for a recipe", "a name that ends in .yaml")
    if path.exists():
        raise UsageError(f"{path} exists", "a new file: a recipe is not overwritten")
    resolve_output_file(path)


# --- what people see -------------------------------------------------------------------------------------------------


def _verdict_text(estimate: ResourceEstimate) -> str:
    return VERDICTS[estimate.verdict].format(format_run_title(estimate), estimate.gpu)


def _evidence_table(heading: str, evidence: Mapping[str, str], figures: Iterable[LabelledFigure]) -> Table:
    """Return a table of label, value, and the kind of evidence for the field that the value is of."""
    from ..planning.plan_result import EVIDENCE

    def find_kind(field: str) -> str:
        # The weakest kind: --sources and --json say all.
        return next((kind for kind in reversed(("given", *EVIDENCE)) if kind in evidence.get(field, "")), "")

    cells = [(label, value, find_kind(field)) for label, value, field in figures]
    return make_table(heading, "", "evidence", text_column_indices=[2], rows=cells)


def _render_answer(run: PlannedRun) -> Iterator[Any]:
    """Yield the answer of one plan: whether it fits, what to change or what is left, and how long it takes."""
    yield Text(f"{_verdict_text(run.estimate)}:", style="bold")
    yield from (f"{label}: {text}" if label else text for label, text in run.lines())


def _list_sources(estimate: ResourceEstimate, gpu: GpuSpec) -> Iterator[tuple[str, str]]:
    """Yield what each figure is from: the base, the GPU, the prices, and the kinds of evidence."""
    from ..hardware.machine_choice import list_gpu_price_and_rent_texts

    yield "base", estimate.evidence.get("model", "")
    yield gpu.name, gpu.format_source()
    yield from ((amount, source) for kind, amount, source in list_gpu_price_and_rent_texts(gpu.name) if kind == "rent")
    yield from ((name, text) for name, text in estimate.evidence.items() if name != "model")


def _render_details(run: PlannedRun, gpu: GpuSpec) -> Iterator[Any]:
    """Yield the figures of one plan: memory by part, sizes, time, advice."""
    estimate, prices = run.estimate, run.cost.run.prices if run.cost is not None else ()
    parts = estimate.evidence.get("parts", "").partition(";")[0]
    evidence = {**estimate.evidence, "parts": parts, "cost": "computed", "rent": "published" if prices else "given"}
    yield ""
    yield _evidence_table("memory", evidence, estimate.list_memory_figures())
    yield ""
    yield _evidence_table("run", evidence, run.list_figures(unified_memory=gpu.unified))
    if prices:
        dates = sorted({p.date for p in prices})
        providers = ", ".join(dict.fromkeys(p.provider for p in prices))
        yield f"prices: {providers}, {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]]))}"
    if estimate.advice:
        advice = [(a.change, format_bytes(a.saves), a.verdict) for a in estimate.advice]
        yield ""
        yield make_table("to save memory", "saves", "then it", text_column_indices=[2], rows=advice)


def _estimates_table(estimates: Sequence[ResourceEstimate]) -> Table:
    rows = [
        (
            e.method,
            format_count(e.trainable_params),
            format_bytes(e.adapter_bytes),
            _gib(e.allocated_bytes),
            e.reserved_bytes.format(_gib).replace(" to ", "–"),
            e.verdict,
            str(e.max_seq_len or "-"),
            e.format_speed().replace(" to ", "–") or "-",
        )
        for e in estimates
    ]
    headings = ("method", "trains", "adapter", "allocated\nGiB", "reserved\nGiB", "verdict", "max\nrow", "tokens/s")
    made = make_table(*headings, text_column_indices=[5], rows=rows)
    made.padding = (0, 1, 0, 0)
    made.columns[5].min_width = 8  # in 80 columns the verdict may take two lines
    return made


def _render_serving(served: ServingEstimate) -> Iterator[Any]:
    """Yield the parts of a plan for serving."""
    yield Text(f"\nserved by {served.engine}: {served.verdict}", style="bold")
    yield "\n".join(f"{label}: {text}" if label else text for label, text in served.lines()) + "\n"
    yield _evidence_table("memory", served.evidence, served.list_memory_figures())


def _gib(n: float) -> str:
    return f"{n / 2**30:.{1 if n >= 10 * 2**30 else 2}f}"
