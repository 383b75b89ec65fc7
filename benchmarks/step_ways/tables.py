"""From what the workers of `benchmarks/step.py` reported to figures, checks and Markdown tables."""

import statistics
from typing import Any

GIB = 1 << 30
LEVERS = ("no-sharing", "no-layout", "all-logits", "plain-maps", "no-pages", "all-off")
LABELS = {
    "ours": "slimtune",
    "ours-bf16": "slimtune",
    "peft-tour": "PEFT, quick tour: Trainer, fp32 weights, dropout 0.1, padded",
    "peft-tour-auto": "PEFT, quick tour, weights in the checkpoint's dtype",
    "peft-padded": "PEFT, padded",
    "peft-sorted": "PEFT, padded, several passes sorted by length",
    "peft-packed": "PEFT, packed in one sequence, block-diagonal mask",
    "peft-packs": "PEFT, packed in several sequences",
    "trl": "TRL SFTTrainer, packing in one sequence",
    "trl-packs": "TRL SFTTrainer, packing in several sequences",
    "trl-autocast": "TRL SFTTrainer, packing, autocast (its default)",
    "no-sharing": "shared beginnings laid once",
    "no-layout": "attention by segment, no mask between rows (beside no sharing)",
    "all-logits": "logits at supervised positions only, in chunks",
    "plain-maps": "low-rank maps as one step of autograd",
    "no-pages": "freed memory kept for the next step",
    "all-off": "all of these",
}
REFERENCE = {"no-layout": "no-sharing"}
"""What a lever is measured beside, where that is not `ours`: what it needs is off as well."""

Rounds = list[dict[str, Any]]


def figures(said: dict[str, Any], rounds: Rounds) -> dict[str, Any]:
    """Medians over a way's rounds, the first of which warmed up."""
    kept = rounds[1:]
    steps = sum(len(r["losses"]) for r in kept) or 1
    return {
        "adapters": said["adapters"],
        "rows_per_second": statistics.median(r["rows"] / r["seconds"] for r in kept),
        "tokens_per_second": statistics.median(r["tokens"] / r["seconds"] for r in kept),
        "positions_per_step": sum(r["positions"] for r in kept) / steps,
        "peak_rss_bytes": rounds[-1]["peak_rss_bytes"],
        "above_start_bytes": rounds[-1]["peak_rss_bytes"] - said["before_bytes"],
        "first_loss": rounds[0]["losses"][0],
        "ready": said,
        "rounds": rounds,
    }


def compare(found: dict[str, dict[str, Any]], own: str) -> None:
    """Put into each way's figures the speed of `own`, ours, in the same turns, and how much faster that is."""
    for name, way in found.items():
        beside = REFERENCE.get(name, own)
        way["beside"] = beside = beside if beside in found else own
        way["beside_rows_per_second"] = found[beside]["rows_per_second"]
        way["ours_is_faster_by"] = way["beside_rows_per_second"] / way["rows_per_second"]


def check(found: dict[str, dict[str, Any]], allowed: float) -> None:
    """Raise where two ways do not train the same thing: other parameters, rows or first loss."""
    own = next(iter(found.values()))
    for name, way in found.items():
        for what in ("rows", "tokens", "supervised"):
            pairs = zip(way["rounds"], own["rounds"], strict=False)  # some run fewer rounds
            assert all(theirs[what] == here[what] for theirs, here in pairs), f"{name} ran other {what} than ours"
        assert way["ready"]["trained"] == own["ready"]["trained"], f"{name} trains other parameters than ours"
        assert way["ready"]["threads"] == own["ready"]["threads"], f"{name} runs on other threads than ours"
        apart = abs(way["first_loss"] - own["first_loss"]) / own["first_loss"]
        if apart > allowed:
            raise SystemExit(f"{name} begins at a loss of {way['first_loss']:.4f}, ours at {own['first_loss']:.4f}")


def share_of_ceiling(ceiling: list[Rounds], ours: Rounds) -> dict[str, Any]:
    """Return what part of a way's time the bare products take; `ceiling`: measured before and after each round."""
    pairs = list(zip(*ceiling, ours, strict=True))[1:]
    for before, _, own in pairs:
        assert before["positions"] == own["positions"], "the ceiling is of other positions"
    every = [r for before, after, _ in pairs for r in (before, after)]
    return {
        "share": statistics.median((b["seconds"] + a["seconds"]) / 2 / o["seconds"] for b, a, o in pairs),
        "flops_per_second": statistics.median(r["operations"] / r["seconds"] for r in every),
        "square_flops_per_second": {k: statistics.median(r["square"][k] for r in every) for k in every[0]["square"]},
        "rounds": ceiling,
    }


def report(results: dict[str, Any], setting: str) -> str:
    """The results, each part under its title, as Markdown."""
    ready = [way["ready"] for part in results.values() for way in part["ways"].values()]
    versions = sorted({f"{name} {found}" for said in ready for name, found in said["versions"].items()})
    lines = [f"{setting}, {ready[0]['threads']} threads; {', '.join(versions)}."]
    for title, part in results.items():
        found = part["ways"]
        lines += ["", f"### {title}", ""]
        lines += lever_table(found) if set(found) & set(LEVERS) else [*main_table(found), "", *verdicts(found)]
        if "ceiling" in part:
            c = part["ceiling"]
            rates = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in c["square_flops_per_second"].items())
            lines += [
                "",
                f"Ceiling: the bare products take {c['share']:.2f} of our step's time without sharing, at "
                f"{c['flops_per_second'] / 1e9:.0f} GFLOP/s (a square of 2048: {rates} GFLOP/s).",
            ]
    return "\n".join(lines) + "\n"


def main_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| way | adapters | rows/s | trained tokens/s | positions a step | peak memory | of it while training "
        "| slimtune is faster by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, way in found.items():
        lines.append(
            f"| {label(name)} | {way['adapters']} | {way['rows_per_second']:.2f} | {way['tokens_per_second']:.0f} "
            f"| {way['positions_per_step']:.0f} | {way['peak_rss_bytes'] / GIB:.2f} GiB "
            f"| {way['above_start_bytes'] / GIB:.2f} GiB | {way['ours_is_faster_by']:.2f}× |"
        )
    return lines


def lever_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| lever | rows/s without it | it makes the step faster by | peak memory without it |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, way in found.items():
        lever, gain = (label(name), f"{way['ours_is_faster_by']:.2f}×") if name != "ours" else ("(everything on)", "")
        peak = way["peak_rss_bytes"] / GIB
        lines.append(f"| {lever} | {way['rows_per_second']:.2f} | {gain} | {peak:.2f} GiB |")
    return lines


def verdicts(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the table comes to, one line each: beside the quick tour, beside the best peer, and in memory."""
    peers = {n: w for n, w in found.items() if not n.startswith("ours")}
    lines = [f"- {label(n)}: {w['ours_is_faster_by']:.2f}×" for n, w in peers.items() if n.startswith("peft-tour")]
    best = {n: w for n, w in peers.items() if not n.startswith("peft-tour")}
    for dtype in sorted({w["adapters"] for w in best.values()}):
        name, way = min(
            ((n, w) for n, w in best.items() if w["adapters"] == dtype), key=lambda pair: pair[1]["ours_is_faster_by"]
        )
        lines.append(f"- the fastest peer with {dtype} adapters ({label(name)}): {way['ours_is_faster_by']:.2f}×")
    if peers:
        least = min(peers, key=lambda n: peers[n]["peak_rss_bytes"])
        most = max(w["peak_rss_bytes"] for n, w in found.items() if n.startswith("ours"))
        lines.append(
            f"- peak memory: {most / GIB:.2f} GiB, the least of a peer ({label(least)}) "
            f"{peers[least]['peak_rss_bytes'] / GIB:.2f} GiB"
        )
    return lines


def label(name: str) -> str:
    return LABELS.get(name) or LABELS[name.removesuffix("-bf16")]
