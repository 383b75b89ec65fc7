"""The comparison as a table: Markdown for `table.md`, cells of text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.formatting import format_bytes, format_duration
from .report import COSTS

COLUMNS = (
    "method", "rate", "trains", "file", "peak memory", "time", "held-out loss", "gain [95 %]", "best for its",
)  # fmt: skip


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a method's cells, one for each of `COLUMNS`."""
    low, high = line["loss_reduction_ci95"]
    return (
        line["method"],
        f"{line['rate']:.2g} {line['rate_from']}",
        f"{line['trained_percent']:.3g} %",
        format_bytes(line["file_bytes"]),
        format_bytes(line["peak_bytes"]),
        format_duration(line["time_seconds"]),
        f"{line['tuned_loss']:.3f}",
        f"{line['loss_reduction']:.3f} [{low:.3f}, {high:.3f}]",
        ", ".join(line["front"]) or "–",
    )


BRIEF = ("method", "rate", "trains", "file", "peak\nmemory", "time", "gain ± 95 %", "best for its")


def brief(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a method's cells for a terminal of 80 columns, one for each of `BRIEF`."""
    method, _, trains, file, memory, time, _, _, best = cells(line)
    gain = f"{line['loss_reduction']:.3f} ± {line['loss_reduction_ci95'][1] - line['loss_reduction']:.3f}"
    return method, f"{line['rate']:.2g}", trains, file, memory, time, gain, best


def setting(result: Mapping[str, Any]) -> str:
    """Return what was compared, in words."""
    lines = result["methods"]
    spent = sorted({n for line in lines for n in line["trained_tokens"]})
    tokens = f"{spent[0]:,}" if len(spent) == 1 else f"{spent[0]:,} to {spent[-1]:,}" if spent else "no"
    seeds = len(result["seeds"])
    base = "" if result["base_loss"] is None else f", on which the base has {result['base_loss']:.3f} nats a token"
    return (
        f"{result['model']} ({result['dtype']}, {result['device']}): {result['steps']} steps, {tokens} trained tokens "
        f"a cell, {seeds} seed{'s' * (seeds != 1)}; {result['rows']} held-out rows, {result['test_tokens']:,} "
        f"supervised tokens{base}."
    )


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what has to be known beside the table: what is missing, and what the figures are."""
    sources = {"default": "the method's default", "given": "as given", "tuned": "searched on the validation rows"}
    by = {source: [x["method"] for x in result["methods"] if x["rate_from"] == source] for source in sources}
    said = [f"{sources[s]} ({', '.join(who)})" for s, who in by.items() if who]
    found = [f"Rates: {'; '.join(said)}."] if said else []
    found += [f"Left out: {x['method']} ({x['why']})." for x in result["left_out"]]
    for x in result["failed"]:
        what = "the search of its rate" if x["seed"] is None else f"seed {x['seed']}"
        found.append(f"Failed: {x['method']}, {what} ({x['why']}).")
    wanted = len(result["seeds"])
    found += [
        f"{line['method']} has {len(line['seeds'])} of {wanted} seeds."
        for line in result["methods"]
        if len(line["seeds"]) < wanted
    ]
    found += [
        f"The rate found for {name} lies at the edge of the range searched."
        for name, tried in result["searched"].items()
        if tried["at_the_edge"]
    ]
    found += [f"Memory ran out in {x['method']} and the step was done again in smaller passes."
              for x in result["methods"] if x["out_of_memory"]]  # fmt: skip
    if any(line["method"] == "full" for line in result["methods"]):
        found.append(
            "full: every weight trains, AdamW holds fp32 masters of 16-bit weights; its file is the whole model."
        )
    seeds = "seeds and rows" if wanted > 1 else "rows alone: with one seed, seed noise is not measured"
    found.append(
        f"Gain: how much lower than the base's the held-out loss is, nats a token, mean over seeds; its 95 % interval "
        f"covers {seeds}. Best for its {', '.join(COSTS)}: no other method gains more for as little of it. "
        f"Time: of the training steps, {'of the processor' if result['device'] == 'cpu' else 'by the clock'}."
    )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Return `table.md`."""
    rows = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join(' --- ' if i in (0, len(COLUMNS) - 1) else ' ---: ' for i in range(len(COLUMNS)))}|",
        *(f"| {' | '.join(cells(line))} |" for line in result["methods"]),
    ]
    return "\n\n".join([setting(result), "\n".join(rows), *notes(result), result["advice"]]) + "\n"
