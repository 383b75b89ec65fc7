"""`slimtune models`: the bases that plans know without a download."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..core.foundation.formatting import format_count
from ..errors import UsageError, format_names, suggest
from .common import Json, NegativeVerdictResult, make_console, make_table, print_fields, print_outdated_figures_notice

if TYPE_CHECKING:
    from ..hardware.base_choice import BaseChoiceResult
    from ..planning.gpu_specs import GpuSpec
    from ..planning.known_base_fits import KnownBaseFits
    from ..planning.known_bases import KnownBaseFacts

MOST_FITTING = 25
"""Bases that `--fits` shows."""
MOST_RANKED = 5
"""Bases that `--purpose` shows."""
VERDICTS = {"fits": "yes", "tight": "tight", "does not fit": "no"}
TRAINED_IN = {"bfloat16": "16 bits", "nf4": "NF4"}


def models_table(
    family: Annotated[str | None, Option(help="Only a family, such as qwen, or bases whose name begins so.")] = None,
    sources: Annotated[
        bool,
        Option("--sources", help="Also show each base's ids, the source of its facts, and when they were checked."),
    ] = False,
    fits: Annotated[
        str | None,
        Option(
            metavar="GPU", help='Only those that run or train on this GPU, the largest first; "this machine": here.'
        ),
    ] = None,
    purpose: Annotated[
        str | None,
        Option(help="With --fits: rank those that train and run there for chat, json, classify or tools."),
    ] = None,
    as_json: Json = False,
) -> Any:
    """List the bases with a short name: size, licence, context, release, and whether a download needs an account."""
    from ..planning.known_bases import KnownBasesResult, list_known_bases

    bases = list_known_bases(family)
    if purpose is not None:
        if fits is None:
            raise UsageError("--purpose ranks the bases of a machine", hint='add --fits GPU, or --fits "this machine"')
        return _rank_bases(bases, fits, purpose, as_json=as_json)
    if fits is not None:
        return _list_bases_that_fit(bases, fits, as_json=as_json)
    if not as_json:
        rows = (
            (
                b.name, format_count(b.params), str(b.context), b.released,
                "\n".join(textwrap.wrap(b.licence, 18, break_long_words=False)), "yes" if b.gated else "no",
            )
            for b in bases
        )  # fmt: skip
        found = make_table(
            "base", "size", "context", "released", "licence", "gated", text_column_indices=[4, 5], rows=rows
        )
        found.padding = (0, 1, 0, 0)  # room for 18 characters of a licence in 80 columns
        make_console().print(found)
        make_console().print("\ngated: the Hub wants an account that has accepted the licence")
        make_console().print("every command also takes a Hub id, a folder or a GGUF file")
        print_outdated_figures_notice(b.checked for b in bases)
        if sources:
            make_console().print()
            for b in bases:
                print_fields([(b.name, b.format_source())])
    return KnownBasesResult(bases)


def _find_gpu(name: str) -> GpuSpec:
    """Return the GPU with a name, or this machine's."""
    from ..planning.gpu_specs import THIS_MACHINE, require_gpu_by_name
    from ..planning.this_machine import detect_gpu_or_cpu_spec

    return detect_gpu_or_cpu_spec() if name.lower() in (THIS_MACHINE, "here") else require_gpu_by_name(name)


def _rank_bases(
    bases: list[KnownBaseFacts], gpu_name: str, purpose_name: str, *, as_json: bool
) -> BaseChoiceResult | NegativeVerdictResult:
    """Show which bases to tune for a purpose on a machine, the first choice first; return them."""
    from ..hardware.base_choice import PURPOSES, RECENT_MONTHS, BaseChoiceResult, rank_bases_for_purpose
    from ..planning.known_base_fits import ROW_TOKENS, find_known_base_fits

    if (purpose := PURPOSES.get(purpose_name)) is None:
        close = suggest(purpose_name, PURPOSES)
        raise UsageError(f"there is no purpose {purpose_name!r}{close}", f"one of {format_names(PURPOSES)}")
    gpu = _find_gpu(gpu_name)
    ranked = rank_bases_for_purpose(purpose, bases, find_known_base_fits(bases, gpu), gpu)
    result = BaseChoiceResult(gpu.name, purpose_name, ranked)
    if not as_json:
        screen = make_console()
        screen.print(f"{purpose_name}: {purpose.description}\n")
        for place, offer in enumerate(ranked[:MOST_RANKED], 1):
            screen.print(f"{place}. {offer.fit.name} ({format_count(offer.fit.params)}, {offer.fit.released}): "
                         f"{offer.why}")  # fmt: skip
        screen.print(f"\n{len(ranked)} of {len(bases)} suit it on {gpu.name}")
        screen.print(
            f"first those of the last {RECENT_MONTHS} months; no score of a benchmark is known to this ranking"
        )
        screen.print(f"trains: LoRA, a row of {ROW_TOKENS} tokens, --gradient-checkpointing; NF4: --quantization nf4")
        screen.print("writes: in Ollama, Q4_K_M, one request")
        if ranked:
            held = " --quantization nf4" if ranked[0].is_quantized else ""
            screen.print(f"\nnext: slimtune plan {ranked[0].fit.name} --gpu {gpu.name} --gradient-checkpointing{held}",
                         soft_wrap=True)  # fmt: skip
    return result if ranked else NegativeVerdictResult(result)


def _list_bases_that_fit(bases: list[KnownBaseFacts], gpu_name: str, *, as_json: bool) -> KnownBaseFits:
    """Show which bases run and train on a machine; return all of them."""
    from ..planning.interval import format_interval_compact, format_three_digits
    from ..planning.known_base_fits import ROW_TOKENS, KnownBaseFits, find_known_base_fits

    gpu = _find_gpu(gpu_name)
    result = KnownBaseFits(gpu.name, list(find_known_base_fits(bases, gpu)))
    if as_json:
        return result
    fitting = [m for m in result.models if m.fits]
    rows = []
    for m in fitting[:MOST_FITTING]:
        speed = m.serving.decode_tokens_per_second if m.serving is not None else None
        runs = VERDICTS[m.serving.verdict] if m.serving is not None and m.serving.verdict is not None else "-"
        trains = "-"
        if m.training is not None:
            held = f"{TRAINED_IN[m.training.weights]}, " if m.training.verdict != "does not fit" else ""
            trains = held + VERDICTS[m.training.verdict]
        writes = format_interval_compact(speed, format_three_digits)
        rows.append((m.name, format_count(m.params), m.released, runs, writes, trains))
    screen = make_console()
    headings = ("base", "size", "released", "runs", "writes, t/s", "trains")
    screen.print(make_table(*headings, text_column_indices=[3, 5], rows=rows))
    if smaller := len(fitting) - len(rows):
        screen.print(f"and {smaller} smaller ones: --family shows one family's, --json all")
    screen.print(f"\n{len(fitting)} of {len(bases)} run or train on {gpu.name}")
    screen.print("runs: in Ollama, Q4_K_M, 4096 tokens of context, one request")
    screen.print(f"trains: LoRA, a row of {ROW_TOKENS} tokens, --gradient-checkpointing; NF4: --quantization nf4")
    return result
