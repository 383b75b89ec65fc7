"""From finished cells to what they say: a line per method, each pair's difference, the fronts, and one sentence."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ..errors import RunError
from ..evaluation.statistics import (
    SeedEstimate as Estimate,
)
from ..evaluation.statistics import (
    estimate_over_seeds as estimate,
)
from ..evaluation.statistics import (
    holm_correction as holm,
)
from ..evaluation.statistics import (
    pareto_front as front,
)
from ..run_dir import RunDir
from ..utils.formatting import format_bytes, format_duration
from .candidates import Candidate
from .grid import Grid

# On a CPU the processor's time, which hangs less on what else the machine does than the clock's.
COSTS = {"memory": "peak_bytes", "size": "file_bytes", "time": "time_seconds"}
"""What quality is held against, and the field that says it."""
BEYOND = 0.05
"""A difference whose corrected p-value is below this is beyond noise."""
TENTH = 0.1
"""What counts as the same: a cost so much above the least, as peaks and times vary by themselves; a gain surely no more
below the best."""


def lines_of(grid: Grid) -> list[dict[str, Any]]:
    """Return what each entry with a finished cell came to, the highest gain first; means are over its seeds.

    Raises:
        RunError: cells were measured on different rows, or cells of one seed learned from different rows.
    """
    found = []
    for entry in grid.entries:
        seeds = [s for s in grid.seeds if grid.done(entry, s)]
        if seeds:
            found.append(_line(grid, entry, seeds))
    _require_alike(found)
    for cost, name in COSTS.items():
        marks = front([(line[name], line["loss_reduction"]) for line in found])
        for line, mark in zip(found, marks, strict=True):
            line["front"] += [cost] if mark else []
    return sorted(found, key=lambda line: -line["loss_reduction"])


def pairs_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each pair's difference (a - b, nats per token) over the seeds both have, paired by seed and row.

    Where others have several seeds and a pair shares one, what another seed would do to it is not known: it is not said
    to differ beyond noise.
    """
    found, most = [], max((len(line["seeds"]) for line in lines), default=0)
    for a, b in combinations(lines, 2):
        shared = [s for s in a["seeds"] if s in b["seeds"]]
        if not shared:
            continue
        nats = [[theirs - mine for mine, theirs in zip(a["_tuned"][s], b["_tuned"][s], strict=True)] for s in shared]
        d = estimate(nats, a["_tokens"])
        found.append({"a": a["method"], "b": b["method"], "seeds": shared, "difference": d.value,
                      "ci95": [d.low, d.high], "p": d.p})  # fmt: skip
    for pair, p in zip(found, holm([pair["p"] for pair in found]), strict=True):
        pair |= {"p_corrected": p, "beyond_noise": p < BEYOND and len(pair["seeds"]) >= min(most, 2)}
    return found


def advice(lines: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return one sentence: what to take, what does not differ from the best beyond noise, and what is worse.

    The best is taken, or what is as good and cheaper. As good is what surely gains at most a tenth less: not to be told
    from the best is no proof of that where the interval is wide. Cheaper is what is cheapest in most of memory, size
    and time, within a tenth of the cheapest being as cheap; of several, the one with the higher gain.
    """
    if not lines:
        return "No cell was finished, so there is nothing to advise."
    best, others = lines[0], lines[1:]
    if best["loss_reduction_ci95"][0] <= 0:
        return f"Take none of them: the gain of the best, {best['method']}, is not beyond noise ({_gain(best)})."
    if not others:
        return f"{best['method']} alone was measured: {_gain(best)}."
    behind = {p["b"]: p for p in pairs if p["a"] == best["method"]}
    furthest = {x["method"]: behind[x["method"]]["ci95"][1] for x in others if x["method"] in behind}
    alike = [x for x in others if furthest.get(x["method"], math.inf) <= TENTH * best["loss_reduction"]]
    apart = [x for x in others if x not in alike and behind.get(x["method"], {}).get("beyond_noise")]
    open_ = [x for x in others if x not in alike and x not in apart]
    level = [best, *alike]
    cheapest = {cost: min(level, key=lambda x: x[name]) for cost, name in COSTS.items()}

    def cheap(x: Mapping[str, Any]) -> list[str]:
        return [cost for cost, name in COSTS.items() if x[name] <= (1 + TENTH) * cheapest[cost][name]]

    taken = max(level, key=lambda x: (len(cheap(x)), x["loss_reduction"]))
    costs = f"{format_bytes(taken['peak_bytes'])}, a file of {format_bytes(taken['file_bytes'])}, {_time(taken)} a run"
    said = [f"Take {taken['method']} ({_gain(taken)}; {costs})"]
    if alike:
        said.append(f"{_names(level)} are as good as one another, within a tenth of the gain")
        said += [
            f"of these {x['method']} takes the least {cost}" for cost, x in cheapest.items() if cost not in cheap(taken)
        ]
    if open_:
        most = max((furthest[x["method"]] for x in open_ if x["method"] in furthest), default=None)
        do, may = ("does", "it may gain") if len(open_) == 1 else ("do", "they may gain")
        less = "" if most is None else f", but {may} up to {most:.3f} less: more seeds or test rows would tell"
        said.append(f"{_names(open_)} {do} not differ from {best['method']} beyond noise{less}")
    if apart:
        gaps = [best["loss_reduction"] - x["loss_reduction"] for x in apart]
        by = " to ".join(dict.fromkeys(f"{gap:.3f}" for gap in (min(gaps), max(gaps))))
        gain = "gains" if len(apart) == 1 else "loss_reduction"
        said.append(f"{_names(apart)} {gain} {by} nats a token less than {best['method']}")
    if len(best["seeds"]) < 2:
        said.append("one seed: what another seed would give is not known")
    return "; ".join(said) + "."


def _line(grid: Grid, entry: Candidate, seeds: Sequence[int]) -> dict[str, Any]:
    results, measured, rows = [], [], []
    for seed in seeds:
        run = RunDir(grid.cell(entry, seed))
        results.append(json.loads(run.result_file.read_text()))
        measured.append(json.loads(run.evaluation_file("test").read_text()))
        rows.append(json.loads(run.scores_file("test").read_text()))
    tokens = [r["tokens"] for r in rows[0]]
    gains = [m["loss_reduction"] for m in measured]
    gain: Estimate = estimate([[r["base"] - r["tuned"] for r in each] for each in rows], tokens)
    trained, every = results[0]["trainable_params"], results[0]["total_params"]

    def mean(name: str) -> float:
        return statistics.fmean(r[name] for r in results)

    return {
        "method": entry.label,
        "of": entry.method,
        "settings": entry.settings,
        "rate": entry.rate,
        "rate_from": entry.rate_from,
        "seeds": list(seeds),
        "steps": results[0]["steps"],
        "trained_tokens": [r["trained_tokens"] for r in results],
        "trainable_params": trained,
        "total_params": every,
        "trained_percent": 100 * trained / every,
        "file_bytes": results[0]["adapter_bytes"],
        "peak_bytes": mean("peak_bytes"),
        "train_seconds": mean("train_seconds"),
        "time_seconds": mean("train_cpu_seconds" if results[0]["device"] == "cpu" else "train_seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "base_loss": statistics.fmean(m["base_loss"] for m in measured),
        "tuned_loss": statistics.fmean(m["tuned_loss"] for m in measured),
        "loss_reduction": gain.value,
        "loss_reduction_ci95": [gain.low, gain.high],
        "gain_by_seed": gains,
        "gain_sd_seeds": statistics.stdev(gains) if len(gains) > 1 else None,
        "out_of_memory": sum(r.get("oom_events", 0) for r in results),
        "dtype": results[0]["dtype"],
        "device": results[0]["device"],
        "front": [],
        "_tokens": tokens,
        "_tuned": {s: [r["tuned"] for r in each] for s, each in zip(seeds, rows, strict=True)},
        "_rows": [r["line"] for r in rows[0]],
        "_steps": {s: _trained(grid, entry, s) for s in seeds},
    }


def _trained(grid: Grid, entry: Candidate, seed: int) -> list[int]:
    """Return the tokens trained on after each step, which tell the rows and their order."""
    said = (grid.cell(entry, seed) / "metrics.jsonl").read_text().splitlines()
    return [m["trained_tokens"] for m in map(json.loads, said) if m.get("train_loss") is not None]


def _require_alike(lines: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a pairing would be false."""
    for other in lines[1:]:
        first = lines[0]
        if other["_rows"] != first["_rows"] or other["_tokens"] != first["_tokens"]:
            raise RunError(f"{first['method']} and {other['method']} were measured on different rows", "the same rows")
        for seed in set(first["seeds"]) & set(other["seeds"]):
            if first["_steps"][seed] != other["_steps"][seed]:
                raise RunError(
                    f"with seed {seed} {first['method']} and {other['method']} learned from different rows",
                    "the same rows in the same order",
                    "start anew with another --out",
                )


def _gain(line: Mapping[str, Any]) -> str:
    low, high = line["loss_reduction_ci95"]
    return f"gain {line['loss_reduction']:.3f} nats a token, {low:.3f} to {high:.3f}"


def _time(line: Mapping[str, Any]) -> str:
    return format_duration(line["time_seconds"])


def _names(lines: Sequence[Mapping[str, Any]]) -> str:
    names = [line["method"] for line in lines]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
