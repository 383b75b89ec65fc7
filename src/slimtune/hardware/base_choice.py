"""Which of the known bases to tune on a machine for a purpose, the first choice first.

No score of a benchmark is in it: no catalog of slimtune has one. What counts is what is known of a base and a machine:
that it trains and runs there beside a screen, its licence, its age and size, how many bits its weights keep, and
whether its chat template is known to write tools.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log2

from ..core.foundation.formatting import format_bytes
from ..core.foundation.json_results import INLINE
from ..planning.gpu_specs import GpuSpec
from ..planning.interval import format_interval_compact, format_three_digits
from ..planning.known_base_fits import KnownBaseFit
from ..planning.known_bases import KnownBaseFacts
from .machine_choice import SCREEN_BYTES, SCREEN_KINDS

NOT_FOR_BUSINESS = re.compile(r"-nc-|research|^mnpl$|^mrl$")
"""Licences without commercial use: Creative Commons NC, Qwen's and Mistral's for research and for no production."""
OF_ONE_TRADE = re.compile(r"coder|codestral|devstral|-vl-|math")
"""In names of bases that were made for code, pictures or sums."""
RECENT_MONTHS = 18
"""Bases this much older than the newest known one follow the others."""
SIZES_PER_DOUBLING = 4
"""Bases whose sizes differ by less than a fifth count as of one size: the newer comes first."""


@dataclass(frozen=True)
class Purpose:
    """What a tuned model is for, and what a base needs for it."""

    description: str
    """In words."""
    needs_tools: bool = False
    """Whether its chat template must write tools, calls and results."""
    prefers_16_bits: bool = False
    """Whether a base that trains in 16 bits comes before a larger one that trains only in NF4."""


PURPOSES = {
    "chat": Purpose("answers to people, as in support: the largest base"),
    "json": Purpose("fields of a text, as JSON: 16 bits before NF4, then the largest", prefers_16_bits=True),
    "classify": Purpose("one of a few classes: 16 bits before NF4, then the largest", prefers_16_bits=True),
    "tools": Purpose("calls of functions: a chat template that writes tools, then the largest", needs_tools=True),
}
"""By their names on the command line."""


@dataclass(frozen=True)
class BaseOffer:
    """A base that suits a purpose on a machine."""

    fit: KnownBaseFit = field(metadata=INLINE)
    """The base, and what it takes there."""
    licence: str
    """Its name."""
    context: int | None
    """Most tokens of a row; null: not limited."""
    free_bytes: float
    """Of the GPU's memory as sold, what training leaves at least."""
    tools: bool
    """Whether its chat template is known to write tools."""
    why: str
    """What speaks for it, in one sentence."""

    @property
    def is_quantized(self) -> bool:
        """Whether it trains in NF4 alone."""
        return self.fit.training is not None and self.fit.training.weights != "bfloat16"


@dataclass(frozen=True)
class BaseChoiceResult:
    """What `models --fits --purpose --json` prints."""

    gpu: str
    """The machine's GPU."""
    purpose: str
    """One of chat, json, classify and tools."""
    models: list[BaseOffer]
    """The bases, the first choice first."""


def rank_bases_for_purpose(
    purpose: Purpose,
    bases: Iterable[KnownBaseFacts],
    fits: Iterable[KnownBaseFit],
    gpu: GpuSpec,
) -> list[BaseOffer]:
    """Return the bases that surely train and run on a GPU and suit a purpose, the first choice first.

    A GPU that also draws a screen keeps `SCREEN_BYTES` for it. Bases made for one trade, and those whose licence
    excludes business, are left out. First come those of the last `RECENT_MONTHS` months; of one size the newer.
    """
    facts = {base.name: base for base in bases}
    newest = max((_count_months(base.released) for base in facts.values()), default=0)
    room = SCREEN_BYTES if gpu.kind in SCREEN_KINDS else 0
    ranked = []
    for fit in fits:
        base, serving, training = facts[fit.name], fit.serving, fit.training
        if serving is None or training is None or {serving.verdict, training.verdict} != {"fits"}:
            continue
        free = gpu.memory - training.need_bytes.high
        if min(free, gpu.memory - serving.need_bytes.high) < room or (purpose.needs_tools and not base.tools):
            continue
        if NOT_FOR_BUSINESS.search(base.licence) or OF_ONE_TRADE.search(base.name):
            continue
        is_old = newest - _count_months(base.released) > RECENT_MONTHS
        why = _explain_offer(fit, base, free, has_screen=bool(room))
        offer = BaseOffer(fit, base.licence, base.context, free, base.tools, why)
        is_last_choice = is_old, purpose.prefers_16_bits and offer.is_quantized
        size = round(SIZES_PER_DOUBLING * log2(fit.params))
        ranked.append(((is_last_choice, -size, -_count_months(base.released), fit.name), offer))
    return [offer for _, offer in sorted(ranked, key=lambda item: item[0])]


def _count_months(released: str) -> int:
    year, month = released.split("-")[:2]
    return 12 * int(year) + int(month)


def _explain_offer(fit: KnownBaseFit, base: KnownBaseFacts, free: float, *, has_screen: bool) -> str:
    """Return what speaks for a base, in one sentence."""
    bits = "NF4" if fit.training is not None and fit.training.weights == "nf4" else "16 bits"
    speed = fit.serving.decode_tokens_per_second if fit.serving is not None else None
    parts = [
        f"trains in {bits} and leaves {format_bytes(int(free))}{' for the screen' if has_screen else ''}",
        f"writes {format_interval_compact(speed, format_three_digits)} tokens/s" if speed is not None else "",
        f"{base.context} tokens of context" if base.context else "",
        f"licence {base.licence}{', behind an account' if base.gated else ''}",
        "its template writes tools" if base.tools else "",
    ]
    return ", ".join(filter(None, parts))
