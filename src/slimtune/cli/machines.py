"""How machines are shown beside each other, by `slimtune gpus A B`, `choose` and `cost`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError, format_names, nearest
from ..utils.formatting import format_bytes

if TYPE_CHECKING:
    from ..planning.gpus import Gpu
    from ..planning.machines import Machine
    from ..planning.result import Range


def format_short(values: Range | None, format_number: Callable[[float], str]) -> str:
    """Return a range as `92–134`, a single value once, `-` for None."""
    if values is None:
        return "-"
    first, last = (format_number(v) for v in values)
    return last if first == last else f"{first}–{last}"


def format_hours_range(hours: Range | None) -> str:
    """Return a time as `39–96 min`, `1.1–2.6 h` or `2–5 days`."""
    if hours is None:
        return "-"
    factor, unit = (60, "min") if hours.high < 2 else (1, "h") if hours.high < 72 else (1 / 24, "days")
    low, high = (f"{h * factor:.2g}" if h * factor < 10 else f"{h * factor:.0f}" for h in hours)
    return f"{high} {unit}" if low == high else f"{low}–{high} {unit}"


def format_dollars(values: Range | None) -> str:
    """Return money as `0.22 $` or `999–1300 $`."""
    text = format_short(values, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}")
    return text if text == "-" else f"{text} $"


def machine_rows(machines: Sequence[Machine], run: str | None) -> Iterator[tuple[str, ...]]:
    """Yield a label and a value for each machine; `run` names what is trained, None: nothing."""
    from .plan import format_rate

    def row(label: str, value: Callable[[Machine], str]) -> tuple[str, ...]:
        return (label, *map(value, machines))

    yield row("kind", lambda m: m.gpu.kind)
    yield row("released", lambda m: m.gpu.released or "-")
    yield row("memory", lambda m: format_bytes(m.gpu.memory))
    yield row("bandwidth, GB/s", lambda m: f"{m.gpu.bandwidth / 1e9:.0f}" if m.gpu.bandwidth else "-")
    yield row("16 bits, TFLOPS", lambda m: _format_tflops(m.gpu))
    yield row("watts", lambda m: f"{m.gpu.watts:.0f}" if m.gpu.watts else "-")
    yield row("price", lambda m: format_dollars(m.price))
    yield row("an 8B writes, t/s", lambda m: format_short(m.serving.decode if m.serving else None, format_rate))
    yield row("reads, t/s", lambda m: format_short(m.serving.prefill if m.serving else None, format_rate))
    if run is None:
        return
    yield row("training", lambda m: m.verdict or "-")
    yield row("trains, t/s", lambda m: format_short(m.plan.tokens_per_second if m.plan else None, format_rate))
    yield row(run, lambda m: format_hours_range(m.cost.hours if m.cost else None))
    yield row("its rent", lambda m: format_dollars(m.cost.rent if m.cost else None))
    yield row("its kWh", lambda m: format_short(m.cost.kwh if m.cost else None, "{:.2g}".format))
    if any(m.electricity_dollars for m in machines):
        yield row("its electricity", lambda m: format_dollars(m.electricity_dollars))


def _format_tflops(gpu: Gpu) -> str:
    """Return the rate of 16-bit products: the faster one's, which a CPU has for one of the two dtypes only."""
    rate = max((gpu.rates or {}).get(dtype, 0.0) for dtype in ("float16", "bfloat16")) / 1e12
    return "-" if not rate else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def format_source(gpu: Gpu) -> str:
    """Return where the figures of a GPU are from, and when they were read there."""
    from ..planning.gpus import format_checked

    return f"{gpu.source} (checked {format_checked(gpu.checked)})" if gpu.checked else gpu.source


def list_prices(gpu: str) -> Iterator[tuple[str, str, str]]:
    """Yield `price` or `rent`, the dollars, and where they are from, for each known price of a GPU."""
    from ..planning.gpus import format_checked
    from ..planning.machines import purchases
    from ..planning.throughput import prices

    for p in purchases(gpu):
        yield "price", f"{p.dollars:.0f} $", f"{p.condition}, {format_checked(p.date)}: {p.source}"
    for q in prices(gpu):
        yield "rent", f"{q.dollars_per_hour} $/h", f"{q.provider}, {format_checked(q.date)}: {q.source}"


def read_kinds(text: str | None, known: Sequence[str]) -> list[str]:
    """Return the kinds of machines that a text names, parted by commas; all for None."""
    kinds = list(known) if text is None else [part.strip().lower() for part in text.split(",")]
    for unknown in (kind for kind in kinds if kind not in known):
        raise UsageError(f"there is no kind {unknown!r}{nearest(unknown, known)}", f"one of {format_names(known)}")
    return kinds


def list_machine_sources(machines: Sequence[Machine]) -> Iterator[tuple[str, str]]:
    """Yield where each figure of machines is from, and of what date."""
    for machine in machines:
        yield machine.gpu.name, format_source(machine.gpu)
        yield from ((amount, source) for _, amount, source in list_prices(machine.gpu.name))
    yield "serving", "Llama 3.1 8B in Q4_K_M behind 4096 tokens in llama.cpp; fitted to published runs"


def list_machine_dates(machines: Iterable[Machine]) -> Iterator[str]:
    """Yield the dates of what `list_machine_sources` shows; a price at the launch stays what it was."""
    from ..planning.throughput import prices

    for machine in machines:
        if machine.gpu.checked:  # not of what was measured on this machine
            yield machine.gpu.checked
        yield from (p.date for p in machine.purchases if p.condition != "launch")
        yield from (p.date for p in prices(machine.gpu.name))
