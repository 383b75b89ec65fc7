"""`slimtune plan`: whether a run fits on a GPU, what it takes and how long, before a weight is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option

from ..core.foundation.files import require_output_file, write_atomic
from ..core.foundation.formatting import format_bytes, format_count, format_duration
from ..errors import UsageError
from .common import Json, console, print_fields, table
from .machine_commands import MILLION, format_range, format_source, format_three_digits, list_prices
from .options import recipe_flags
from .planned_jobs import JOB, JOB_SETTINGS, RunsToPlan, load_runs_to_plan, make_plans

if TYPE_CHECKING:
    from ..planning.gpu_specs import Gpu
    from ..planning.plan_result import Plan
    from ..planning.serving_memory import ServingPlan
    from ..planning.throughput import Cost

VERDICTS = {
    "fits": "{} fits on {}",
    "tight": "{} is tight on {}, it may run out of memory",
    "does not fit": "{} does not fit on {}",
}


@recipe_flags("model.device", *JOB_SETTINGS)
def plan(
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
    serve: Annotated[bool, Option("--serve", help="Also plan serving the tuned model on the GPU.")] = False,
    engine: Annotated[str | None, Option(help="With --serve: llama.cpp, ollama or vllm.")] = None,
    precision: Annotated[
        str | None, Option(help="With --serve: precision of the served weights, such as bf16 or q4_k_m.")
    ] = None,
    context: Annotated[int | None, Option(min=1, help="With --serve: tokens of the longest conversation.")] = None,
    price: Annotated[float | None, Option(min=0, help="Price of the GPU in dollars an hour.")] = None,
    details: Annotated[bool, Option("--details", help="Also show memory by part and every figure.")] = False,
    sources: Annotated[bool, Option("--sources", help="Also show where figures are from, and of what date.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Say whether a run will fit, before a weight is loaded.

    Shows what it needs, what to change, and how long it takes; --details shows memory by part and every figure.
    --method takes several (lora,ia3), or all. Exit code 0 also if the run does not fit.
    """
    given = {"engine": engine, "precision": precision, "context": context}
    serving: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if serving and not serve:
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
    from ..planning.gpu_specs import find_gpu, format_checked, gpu_with_memory, is_old, require_trains

    card = find_gpu(gpu) if gpu is not None else gpu_with_memory(vram) if vram is not None else None
    if plot is not None:
        plot = require_figure_path(plot)
    jobs = load_runs_to_plan(job, settings, output_dir=f"runs/{write.stem if write is not None else 'planned'}")
    from ..planning.serving_memory import plan_serving
    from ..planning.this_machine import detect_gpu
    from ..planning.throughput import estimate_cost
    from .plan_chart import draw_bars, write_plot

    card = card or detect_gpu(str(settings.get("model.device", "auto")))
    require_trains(card)
    if write is not None:
        _require_writable(write, jobs)
    served = plan_serving(jobs.model.config, gpu=card, **serving) if serve else None

    plans, errors = make_plans(jobs, card, processes=processes)
    tokens = jobs.tokens or MILLION
    costs = [
        estimate_cost(p.tokens_per_second, tokens, card, dollars_per_hour=price) if p.tokens_per_second else None
        for p in plans
    ]
    unfit = [{"method": method, "why": " ".join(error.message.split())} for method, error in errors.items()]
    if write is not None:
        (recipe,) = jobs.recipes.values()
        # A plan knows names of bases that have no weights here: the recipe says where the weights are.
        model = replace(recipe.model, name=jobs.model.spec)
        note = f"# {_verdict_text(plans[0])}: {plans[0].reason}\n"
        write_atomic(write, note + replace(recipe, model=model).to_yaml())
    if plot is not None:
        write_plot(plans, plot)
    if not as_json:
        screen = console()
        for part in _render_answer(plans[0], tokens, costs[0]) if len(plans) == 1 else [_plans_table(plans)]:
            screen.print(part)
        if card.checked and is_old(card.checked):
            screen.print(f"note: figures of {card.name} are of {format_checked(card.checked)}: --sources has them")
        if details and len(plans) == 1:
            for part in _render_details(plans[0], tokens, costs[0], card):
                screen.print(part)
        for error in unfit:
            screen.print(f"{error['method']} is not planned: {error['why']}")
        if details or len(plans) > 1:
            screen.print()
            screen.print(draw_bars(plans, card, screen))
        if sources:
            screen.print()
            print_fields(_list_sources(plans[0], card))
        for part in _render_serving(served) if served is not None else []:
            screen.print(part)
        if write is not None:
            screen.print(f"\nnext: slimtune train {shlex.quote(str(write))}", soft_wrap=True)
    dicts = [
        {**plan.to_dict(), "cost": {"tokens": tokens, **cost.to_dict()} if cost is not None else None}
        for plan, cost in zip(plans, costs, strict=True)
    ]
    # The fields of a single plan are at the top, too.
    first = dicts[0] if len(dicts) == 1 else {"model": plans[0].model, "card": plans[0].card}
    serve_dict = served.to_dict() if served is not None else None
    return {**first, "plans": dicts, "unfit": unfit, "serve": serve_dict, "plot": plot, "recipe": write}


def name_run(plan: Plan) -> str:
    """Return what is planned: `llama-3.1-8b with lora`."""
    return f"{plan.model} with {plan.method}"


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
    require_output_file(path)


# --- what people see -------------------------------------------------------------------------------------------------


def _verdict_text(plan: Plan) -> str:
    return VERDICTS[plan.verdict].format(name_run(plan), plan.card)


def _evidence_table(heading: str, evidence: Mapping[str, str], rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return a table of label, value, and the kind of evidence for the field that the value is of."""
    from ..planning.plan_result import EVIDENCE

    def kinds(field: str) -> str:
        # The weakest kind: --sources and --json say all.
        return next((kind for kind in reversed(EVIDENCE) if kind in evidence.get(field, "")), "")

    cells = [(label, value, kinds(field)) for label, value, field in rows]
    return table(heading, "", "evidence", left=[2], rows=cells)


def _render_answer(plan: Plan, tokens: int, cost: Cost | None) -> Iterator[Any]:
    """Yield the answer of one plan: whether it fits, what to change or what is left, and how long it takes."""
    yield Text(f"{_verdict_text(plan)}:", style="bold")
    yield plan.reason
    for advice in plan.advice[:1]:
        yield f"change: {advice.change} saves {format_bytes(advice.saves)}; then it {advice.verdict}"
    rows = "rows" if plan.batch > 1 else "row"
    longest = f"{plan.batch} {rows} of up to {plan.max_seq_len} tokens" if plan.max_seq_len else ""
    is_same = (plan.max_batch_size, plan.seq_len) == (plan.batch, plan.max_seq_len)
    most = f"{_count(plan.max_batch_size, 'rows')} of {plan.seq_len}" if plan.max_batch_size and not is_same else ""
    yield f"largest that fits: {' or '.join(filter(None, (longest, most))) or 'nothing'}"
    if plan.tokens_per_second is None:
        is_here = "this machine" in plan.evidence.get("usable_bytes", "")
        yield f"speed: not known{'; `slimtune bench` measures it' if is_here else ''}"
    else:
        evidence = plan.evidence.get("tokens_per_second", "")
        measured = f", {evidence}" if evidence.startswith("measured") else ""
        yield f"speed: {_format_speed(plan)} tokens/s{measured}"
        if cost is not None:
            yield f"time: {_format_cost(tokens, cost)}"
    yield from (f"note: {note}" for note in plan.notes)


def _format_speed(plan: Plan) -> str:
    """Return the tokens a second, "" if they are not known."""
    return format_range(*plan.tokens_per_second, "{:.0f}".format) if plan.tokens_per_second is not None else ""


def _format_cost(tokens: int, cost: Cost) -> str:
    """Return time and rent of a run."""
    from ..planning.gpu_specs import MAX_AGE, is_old

    name = "a million tokens" if tokens == MILLION else f"the run, {format_count(tokens)} tokens,"
    text = f"{name} in {format_range(3600 * cost.hours.low, 3600 * cost.hours.high, format_duration)}"
    if cost.rent is not None:
        text += f", {format_range(*cost.rent, '{:.2g} $'.format)}"
        old = f", older than {MAX_AGE} days" if any(is_old(p.date) for p in cost.prices) else ""
        spot = "spot " if any("spot" in p.provider for p in cost.prices) else ""
        text += f" ({spot}prices of {min(p.date for p in cost.prices)}{old})" if cost.prices else ""
    return text


def _list_sources(plan: Plan, card: Gpu) -> Iterator[tuple[str, str]]:
    """Yield what each figure is from: the base, the card, the prices, and the kinds of evidence."""
    yield "base", plan.evidence.get("model", "")
    yield card.name, format_source(card)
    yield from ((amount, source) for kind, amount, source in list_prices(card.name) if kind == "rent")
    yield from ((name, text) for name, text in plan.evidence.items() if name != "model")


def _render_details(plan: Plan, tokens: int, cost: Cost | None, card: Gpu) -> Iterator[Any]:
    """Yield the figures of one plan: memory by part, sizes, time, advice."""
    yield ""
    evidence = {**plan.evidence, "parts": plan.evidence.get("parts", "").partition(";")[0], "cost": "computed"}
    # A part that is 0 at the highest point of the step is not shown.
    parts = [(part, format_bytes(size), "parts") for part, size in plan.parts.items() if part != "runtime" and size]
    ranges = [
        ("tensors, at most", format_bytes(plan.allocated_bytes), "allocated_bytes"),
        ("reserved for them", format_range(*plan.reserved_bytes), "reserved_bytes"),
        ("runtime", format_range(*plan.runtime_bytes), "runtime_bytes"),
        ("needed", format_range(*plan.need), "need_bytes"),
        ("usable", format_range(*plan.usable_bytes), "usable_bytes"),
    ]
    yield _evidence_table("memory", evidence, [*parts, *ranges])
    yield ""
    percent = f"{100 * plan.trainable_fraction:.3g} %"
    at_most = "at most " if plan.adapter_bytes_at_most else ""
    figures = [
        ("micro-batch", f"{_count(plan.batch, 'rows')}, {plan.max_tokens_per_micro_batch} tokens", "batch"),
        ("longest row in it", f"{plan.seq_len} tokens", "seq_len"),
        ("micro-batches in a step", str(plan.micro_batches), "micro_batches"),
        ("weights held in", plan.dtype, "dtype"),
        ("trained parameters", f"{format_count(plan.trainable_params)} ({percent})", "trainable_params"),
        ("adapter file", at_most + format_bytes(plan.adapter_bytes), "adapter_bytes"),
        (
            "CPU memory, of the same memory" if card.unified else "CPU memory",
            format_bytes(plan.host_bytes),
            "host_bytes",
        ),
        ("disk, beside the base's files", format_bytes(plan.disk_bytes), "disk_bytes"),
        (f"longest row that fits, {plan.batch} at once", _count(plan.max_seq_len, "tokens"), "max_seq_len"),
        (f"most rows of {plan.seq_len} that fit", _count(plan.max_batch_size, "rows"), "max_batch_size"),
    ]
    speed = _format_speed(plan)
    figures.append(("tokens in a second", speed or "not known", "tokens_per_second" if speed else ""))
    if cost is not None:
        name = "a million tokens" if tokens == MILLION else f"the run, {format_count(tokens)} tokens"
        figures.append((name, format_range(3600 * cost.hours.low, 3600 * cost.hours.high, format_duration), "cost"))
        if cost.kwh is not None:
            figures.append(("", format_range(*cost.kwh, "{:.2g} kWh".format), "cost"))
    rows = _evidence_table("run", evidence, figures)
    if cost is not None and cost.rent is not None:
        dates = sorted({p.date for p in cost.prices})
        providers = ", ".join(dict.fromkeys(p.provider for p in cost.prices))
        period = " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))
        rows.add_row("", format_range(*cost.rent, "{:.2g} $".format), "published" if dates else "given")
    yield rows
    if cost is not None and cost.prices:
        yield f"prices: {providers}, {period}"
    if plan.advice:
        advice = [(a.change, format_bytes(a.saves), a.verdict) for a in plan.advice]
        yield ""
        yield table("to save memory", "saves", "then it", left=[2], rows=advice)


def _plans_table(plans: Sequence[Plan]) -> Table:
    rows = [
        (
            p.method,
            format_count(p.trainable_params),
            format_bytes(p.adapter_bytes),
            _gib(p.allocated_bytes),
            format_range(*p.reserved_bytes, _gib).replace(" to ", "–"),
            p.verdict,
            str(p.max_seq_len or "-"),
            _format_speed(p).replace(" to ", "–") or "-",
        )
        for p in plans
    ]
    headings = ("method", "trains", "adapter", "allocated\nGiB", "reserved\nGiB", "verdict", "max\nrow", "tokens/s")
    made = table(*headings, left=[5], rows=rows)
    made.padding = (0, 1, 0, 0)
    made.columns[5].min_width = 8  # in 80 columns the verdict may take two lines
    return made


def _render_serving(served: ServingPlan) -> Iterator[Any]:
    """Yield the parts of a plan for serving."""
    adapter = "the adapter merged" if served.merged else "the adapter beside it"
    yield Text(f"\nserved by {served.engine}: {served.verdict}", style="bold")
    yield f"{served.precision}, {adapter}, {served.context} tokens of context: {served.reason}"
    decode, prefill = served.decode_tokens_per_second, served.prefill_tokens_per_second
    if decode is None or prefill is None:
        yield "speed: not known\n"
    else:
        yield (
            f"speed: {format_range(*decode, format_three_digits)} tokens/s written behind {served.context} tokens, "
            f"{format_range(*prefill, format_three_digits)} tokens/s of a prompt read\n"
        )
    rows = [(part, format_bytes(size), part) for part, size in served.parts.items()]
    rows += [
        ("buffers", format_range(*served.compute_bytes), "compute_bytes"),
        ("runtime", format_range(*served.runtime_bytes), "runtime_bytes"),
        ("needed", format_range(*served.need), "need_bytes"),
        ("CPU memory", format_bytes(served.host_bytes), "host_bytes"),
        ("file", format_bytes(served.file_bytes), "file_bytes"),
        ("longest context", _count(served.max_context or 0, "tokens"), "max_context"),
    ]
    if decode is not None and prefill is not None:
        rows.append(
            ("tokens written in a second", format_range(*decode, format_three_digits), "decode_tokens_per_second")
        )
        rows.append(
            ("tokens of a prompt in a second", format_range(*prefill, format_three_digits), "prefill_tokens_per_second")
        )
    yield _evidence_table("memory", served.evidence, rows)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun if n > 1 else noun.removesuffix('s')}" if n else "none fits"


def _gib(n: float) -> str:
    return f"{n / 2**30:.{1 if n >= 10 * 2**30 else 2}f}"
