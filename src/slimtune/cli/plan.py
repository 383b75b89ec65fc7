"""`slimtune plan`: whether a job will run on a card, what it takes and how long, before a weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import slimtune.cli.jobs as jobs

from ..errors import SlimtuneError, UsageError
from ..utils.formatting import format_bytes, format_count, format_duration
from .common import Json, SetOption, console, table

if TYPE_CHECKING:
    from ..planning.gpus import Gpu
    from ..planning.result import Plan
    from ..planning.serving import ServingPlan
    from ..planning.throughput import Cost

MILLION = 1_000_000
VERDICTS = {
    "fits": "{} fits on {}",
    "tight": "{} is tight on {}, it may run out of memory",
    "does not fit": "{} does not fit on {}",
}


def plan(
    job: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE.yaml",
            help="A base (alias, Hub id, folder, config.json or GGUF file), or a recipe; flags override it.",
            show_default=False,
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="The card, see `slimtune gpus`. Without it: this machine.")] = None,
    vram: Annotated[str | None, typer.Option(help="A card of which only the memory is known, as 24GiB.")] = None,
    method: jobs.MethodOption = None,
    rank: jobs.RankOption = None,
    alpha: jobs.AlphaOption = None,
    batch_size: jobs.BatchOption = None,
    seq_len: jobs.LengthOption = None,
    accumulate: jobs.AccumulateOption = None,
    optimizer: jobs.OptimizerOption = None,
    quantization: jobs.QuantOption = None,
    checkpointing: jobs.CheckpointingOption = None,
    offload: jobs.OffloadOption = None,
    tile: jobs.TileOption = None,
    dtype: jobs.DtypeOption = None,
    packing: jobs.PackingOption = None,
    processes: jobs.ProcessesOption = None,
    data: jobs.DataOption = None,
    sets: SetOption = None,
    write: Annotated[
        Path | None, typer.Option(metavar="RECIPE.yaml", help="Write the job as a recipe; needs --data.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bars as .svg or .png.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Plan using the tuned model on the card, too.")] = False,
    engine: Annotated[str | None, typer.Option(help="With --serve: llama.cpp, ollama or vllm.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="With --serve: of the served weights, as bf16 or q4_k_m.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="With --serve: tokens of the longest chat.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars that the card costs in an hour.")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Say whether a job will run, before a weight is loaded.

    Memory by part, the longest row and largest batch that fit, time, and what to change. Exit code 0 also where it
    does not fit: that is the answer.
    """
    given = dict(locals())
    serving = {name: given[name] for name in ("engine", "precision", "context") if given[name] is not None}
    if serving and not serve:
        raise UsageError(f"--{next(iter(serving))} says how the tuned model is served", hint="add --serve")
    if price == 0:
        raise UsageError("--price is 0", "dollars an hour, above 0", "leave it out: the table's prices are taken")
    from ..planning.bars import draw_bars, require_plot
    from ..planning.bars import write_plot as draw
    from ..planning.serving import plan_serving as serving_of

    card = _card(gpu, vram)
    if plot is not None:
        require_plot(plot)
    asked = jobs.asked_for(job, given)
    if write is not None:
        _require_recipe(write, asked)
    served = serving_of(asked.outline.config, gpu=card, **serving) if serve else None

    found, unfit = jobs.plans_of(asked, card, processes=processes or 1)
    if write is not None:
        _write(write, asked, found[0])
    if plot is not None:
        draw(found, plot)
    costs = [_cost(p, card, asked.tokens, price) for p in found]
    if not as_json:
        screen = console()
        for shown in _one(found[0], costs[0]) if len(found) == 1 else [_several(found)]:
            screen.print(shown)
        for name, e in unfit.items():
            screen.print(f"{name} is not planned: {_line(e)}", markup=False)
        screen.print()
        screen.print(draw_bars(found, card))
        for shown in _served(served) if served is not None else []:
            screen.print(shown)
        if write is not None:
            screen.print(f"\nnow: slimtune train {write}", markup=False)
    return _told(found, costs, unfit) | {
        "serve": served.to_dict() if served is not None else None,
        "plot": plot,
        "recipe": write,
    }


def job_text(plan: Plan) -> str:
    """Return what is planned: `llama-3.1-8b with lora`."""
    return f"{plan.model} with {'every weight trained' if plan.method == jobs.FULL else plan.method}"


def verdict_text(plan: Plan) -> str:
    """Return the verdict as a sentence."""
    return VERDICTS[plan.verdict].format(job_text(plan), plan.card)


def between(low: float, high: float, text: Callable[[float], str] = format_bytes) -> str:
    """Return two ends as people read them: `17.9 to 18.6 GiB`."""
    first, last = text(low), text(high)
    if first == last:
        return last
    number, _, unit = first.rpartition(" ")
    shared = number.replace(".", "").isdigit() and last.endswith(f" {unit}")
    return f"{number if shared else first} to {last}"


def _card(gpu: str | None, vram: str | None) -> Gpu:
    from ..planning.gpus import detect_gpu, find_gpu, gpu_with_memory

    if gpu is not None and vram is not None:
        raise UsageError("--gpu and --vram are both given", "one of them: --gpu names a card, --vram its memory alone")
    return find_gpu(gpu) if gpu is not None else gpu_with_memory(vram) if vram is not None else detect_gpu()


def _require_recipe(path: Path, asked: jobs.Asked) -> None:
    """Refuse, before anything is planned, what could not be written as a recipe that runs."""
    if len(asked.recipes) != 1 or jobs.FULL in asked.recipes:
        raise UsageError(f"--write got {', '.join(asked.recipes)}", "one method that trains", "--method lora")
    if asked.beyond:
        given = ", ".join(f"{name} {value}" for name, value in asked.beyond.items())
        raise UsageError(f"no recipe trains with {given}", hint="leave it out, or --write")
    if not asked.with_data:
        raise UsageError("--write needs the rows that the recipe trains on", hint="--data rows.jsonl")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{str(path)!r} is no name of a recipe", "one that ends in .yaml")
    if path.exists():
        raise UsageError(f"{path} is there already", "a new file: a recipe is not written over")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r} to write {path.name} into")


def _write(path: Path, asked: jobs.Asked, plan: Plan) -> None:
    from ..utils.files import write_atomic

    (recipe,) = asked.recipes.values()
    # A plan knows names of bases that nothing can be loaded by: the recipe says where the weights are.
    base = recipe.model.model_copy(update={"name": asked.outline.spec})
    note = f"# {verdict_text(plan)}: {plan.reason}\n"
    write_atomic(path, note + recipe.model_copy(update={"model": base}).to_yaml())


def _told(
    plans: Sequence[Plan], costs: Sequence[tuple[int, Cost] | None], unfit: Mapping[str, SlimtuneError]
) -> dict[str, Any]:
    """Return what `--json` prints; of one plan the fields lie at the top, too."""
    told = [
        {**p.to_dict(), "cost": {"tokens": c[0], **c[1].to_dict()} if c is not None else None}
        for p, c in zip(plans, costs, strict=True)
    ]
    return (told[0] if len(told) == 1 else {"model": plans[0].model, "card": plans[0].card}) | {
        "plans": told,
        "unfit": [{"method": name, "why": _line(e)} for name, e in unfit.items()],
    }


def _cost(plan: Plan, card: Gpu, tokens: int | None, price: float | None) -> tuple[int, Cost] | None:
    """Return tokens, and what training on them takes: the run's, or a million where the rows were not read."""
    from ..planning.throughput import estimate_cost

    if plan.tokens_per_second is None:
        return None
    tokens = MILLION if tokens is None else tokens
    return tokens, estimate_cost(plan.tokens_per_second, tokens, card, dollars_per_hour=price)


def _one(plan: Plan, cost: tuple[int, Cost] | None) -> Iterator[Any]:
    """Yield what people see of one plan: verdict, memory by part, figures, advice."""
    yield Text(f"{verdict_text(plan)}:", style="bold")
    yield Text(f"{plan.reason}\n")
    yield _memory(plan)
    yield ""
    yield _figures(plan, cost)
    if plan.advice:
        yield ""
        rows = table("to save memory", "saves", "then it")
        rows.columns[2].justify = "left"
        for advice in plan.advice:
            rows.add_row(Text(advice.change), format_bytes(advice.saves), advice.verdict)
        yield rows


def _evidenced(first: str, second: str) -> Table:
    rows = table(first, second, "evidence")
    rows.columns[0].no_wrap = True
    rows.columns[2].justify, rows.columns[2].no_wrap = "left", False
    return rows


def _memory(plan: Plan) -> Table:
    rows, evidence = _evidenced("memory", ""), plan.evidence
    for part, size in plan.parts.items():
        if part != "runtime":
            rows.add_row(part, format_bytes(size), _kind(evidence, "parts").partition(";")[0])
    for name, text, field in (
        ("tensors, at most", format_bytes(plan.allocated_bytes), "allocated_bytes"),
        ("reserved for them", between(*plan.reserved_bytes), "reserved_bytes"),
        ("runtime", between(*plan.runtime_bytes), "runtime_bytes"),
        ("needed", between(*plan.need), "need_bytes"),
        ("usable", between(*plan.usable_bytes), "usable_bytes"),
    ):
        rows.add_row(name, text, _kind(evidence, field))
    return rows


def _kind(evidence: Mapping[str, str], field: str) -> str:
    """Return a figure's evidence without its source, which `--json` gives."""
    return re.sub(r" \(.*\)", "", evidence.get(field, ""))


def _figures(plan: Plan, cost: tuple[int, Cost] | None) -> Table:
    rows = _evidenced("job", "")
    share = f"{100 * plan.trainable_fraction:.3g} %"
    at_most = "at most " if plan.adapter_bytes_at_most else ""
    for name, text, field in (
        ("in a pass", f"{_some(plan.batch, 'rows')}, {plan.max_tokens_per_micro_batch} tokens", "batch"),
        ("longest of them", f"{plan.seq_len} tokens", "seq_len"),
        ("micro-batches in a step", str(plan.micro_batches), "micro_batches"),
        ("weights held in", plan.dtype, "dtype"),
        ("trained parameters", f"{format_count(plan.trainable_params)} ({share})", "trainable_params"),
        ("adapter's file", at_most + format_bytes(plan.adapter_bytes), "adapter_bytes"),
        ("machine's memory", format_bytes(plan.host_bytes), "host_bytes"),
        ("disk", format_bytes(plan.disk_bytes), "disk_bytes"),
        (f"longest row, {plan.batch} in a pass", _some(plan.max_seq_len, "tokens"), "max_seq_len"),
        (f"most rows of {plan.seq_len} in a pass", _some(plan.max_batch_size, "rows"), "max_batch_size"),
    ):
        rows.add_row(name, text, _kind(plan.evidence, field))
    if plan.tokens_per_second is None or cost is None:
        rows.add_row("tokens in a second", "not known", "")
        return rows
    speed = between(*plan.tokens_per_second, "{:.0f}".format)
    rows.add_row("tokens in a second", speed, _kind(plan.evidence, "tokens_per_second"))
    tokens, takes = cost
    name = "a million tokens" if tokens == MILLION else f"the run, {format_count(tokens)} tokens"
    rows.add_row(name, between(3600 * takes.hours.low, 3600 * takes.hours.high, format_duration), "computed from these")
    if takes.kwh is not None:
        rows.add_row("", between(*takes.kwh, "{:.2g} kWh".format), "computed from the board's power")
    if takes.rent is not None:
        rows.add_row("", between(*takes.rent, "{:.2g} $".format), _prices(takes))
    return rows


def _prices(cost: Cost) -> str:
    dates = sorted({p.date for p in cost.prices})
    who = ", ".join(dict.fromkeys(p.provider for p in cost.prices))
    return f"published: {who}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}" if dates else "the price given"


def _line(e: SlimtuneError) -> str:
    return " ".join(e.message.split())


def _some(n: int, what: str) -> str:
    return f"{n} {what if n > 1 else what.removesuffix('s')}" if n else "none fits"


def _several(plans: Sequence[Plan]) -> Table:
    rows = table("method", "trains", "adapter", "allocated\nGiB", "reserved\nGiB", "verdict", "max\nrow", "tokens/s")
    rows.padding = (0, 1, 0, 0)
    rows.columns[0].no_wrap = True
    verdict = rows.columns[5]
    verdict.justify, verdict.no_wrap, verdict.min_width = "left", False, 8  # in 80 columns it may take two lines
    for plan in plans:
        speed = plan.tokens_per_second
        rows.add_row(
            plan.method,
            format_count(plan.trainable_params),
            format_bytes(plan.adapter_bytes),
            _gib(plan.allocated_bytes),
            between(*plan.reserved_bytes, _gib).replace(" to ", "–"),
            plan.verdict,
            str(plan.max_seq_len or "-"),
            between(*speed, "{:.0f}".format).replace(" to ", "–") if speed is not None else "-",
        )
    return rows


def _gib(n: float) -> str:
    return f"{n / 2**30:.{1 if n >= 10 * 2**30 else 2}f}"


def _served(served: ServingPlan) -> Iterator[Any]:
    """Yield what people see of the tuned model in use."""
    how = "the adapter merged" if served.merged else "the adapter beside it"
    yield Text(f"\nserved by {served.engine}: {served.verdict}", style="bold")
    yield Text(f"{served.precision}, {how}, {served.context} tokens of context: {served.reason}\n")
    rows, evidence = _evidenced("memory", ""), served.evidence
    for part, size in served.parts.items():
        rows.add_row(part, format_bytes(size), _kind(evidence, part))
    for name, text, field in (
        ("buffers", between(*served.compute_bytes), "compute_bytes"),
        ("runtime", between(*served.runtime_bytes), "runtime_bytes"),
        ("needed", between(*served.need), "need_bytes"),
        ("machine's memory", format_bytes(served.host_bytes), "host_bytes"),
        ("file", format_bytes(served.file_bytes), "file_bytes"),
        ("longest context", _some(served.max_context or 0, "tokens"), "max_context"),
    ):
        rows.add_row(name, text, _kind(evidence, field))
    yield rows
