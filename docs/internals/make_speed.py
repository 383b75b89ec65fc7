"""Write the tables of docs/speed.md, docs/grpo.md and README.md from benchmarks/data/speed.json.

    python docs/internals/make_speed.py [--record FOLDER]

`--record` first takes the figures from FOLDER: what `step.py`, `dpo.py` and `grpo.py` of benchmarks wrote there with
`--json`, as step.json, dpo.json and grpo.json, and `step.py --dtype float32` as step-float32.json. A ratio is that of
the two figures beside it, before they are rounded.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks/data/speed.json"
PAGES = {"docs/speed.md": ("step", "step-float32", "dpo"), "docs/grpo.md": ("grpo",), "README.md": ("summary",)}
SUMMARY = {"step": "LoRA", "dpo": "DPO", "grpo": "GRPO"}
BEGIN, END = "<!-- table: docs/internals/make_speed.py {name} -->\n", "<!-- end of the table -->\n"
STEP_WAYS = {
    "peft-tour": "PEFT's quick tour: fp32, padded, dropout 0.1",
    "peft-tour-auto": "the same in the checkpoint's dtype",
    "peft-packed": "PEFT, packed in one sequence",
    "peft-packs": "PEFT, packed in several sequences",
    "trl-packs": "TRL, packed in several sequences",
    "peft-packs-bf16": "PEFT, packed in several, bf16 adapters",
    "trl-packs-bf16": "TRL, packed in several, bf16 adapters",
}
DPO_WAYS = {
    "trl-precomputed": "TRL at its best: reference before, a pair in a micro-batch",
    "trl": "TRL, reference in each step, a pair in a micro-batch",
}
GRPO_KINDS = {"short": "prompts of about 45 tokens", "long": "prompts of about 300 tokens"}


def read_steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each way of `step.py`."""
    batch = found["arguments"]["batch"]
    return [
        {
            "rows": title,
            "way": STEP_WAYS[name],
            "seconds": batch / way["rows_per_second"],
            "own_seconds": batch / way["beside_rows_per_second"],
            "peak": way["peak_rss_bytes"],
            "own_peak": part["ways"][way["beside"]]["peak_rss_bytes"],
        }
        for title, part in found["parts"].items()
        for name, way in part["ways"].items()
        if name in STEP_WAYS
    ]


def read_preferences(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each way of `dpo.py`."""
    return [
        {
            "rows": title,
            "way": DPO_WAYS[name],
            "seconds": way["seconds"],
            "own_seconds": ways["ours"]["seconds"],
            "peak": way["peak"],
            "own_peak": ways["ours"]["peak"],
        }
        for title, ways in found.items()
        for name, way in ways.items()
        if name in DPO_WAYS
    ]


def read_policies(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each kind of prompts of `grpo.py`; `processor` is processor time in seconds."""

    def median(steps: Sequence[dict[str, float]], name: str) -> float:
        return statistics.median(step[name] for step in steps)

    return [
        {
            "rows": title,
            "way": "TRL's GRPOTrainer with PEFT",
            "seconds": median(found[kind]["trl"], "seconds"),
            "own_seconds": median(found[kind]["ours"], "seconds"),
            "processor": median(found[kind]["trl"], "processor"),
            "own_processor": median(found[kind]["ours"], "processor"),
            "peak": found[kind]["trl"][-1]["peak"],
            "own_peak": found[kind]["ours"][-1]["peak"],
        }
        for kind, title in GRPO_KINDS.items()
    ]


READ = {"step": read_steps, "dpo": read_preferences, "grpo": read_policies}


def record(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of all benchmarks whose results lie in the folder."""
    return {
        file.stem: READ[file.stem.partition("-")[0]](json.loads(file.read_text()))
        for file in sorted(folder.glob("*.json"))
    }


def format_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table of a benchmark: a ratio, and what it is the ratio of."""
    with_processor = "processor" in lines[0]
    head = ["rows", "beside", "time of a step : slimtune's", "peak memory", "slimtune's", "slimtune's part"]
    if with_processor:
        head.insert(3, "processor time")
    found = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for line in lines:
        took, own = line["seconds"], line["own_seconds"]
        cells = [line["rows"], line["way"], f"{took:.2f} s : {own:.2f} s = **{took / own:.2f}×**"]
        if with_processor:
            ratio = line["processor"] / line["own_processor"]
            cells += [f"{line['processor']:.1f} s : {line['own_processor']:.1f} s = {ratio:.2f}×"]
        cells += [f"{line[name] / 2**30:.2f} GiB" for name in ("peak", "own_peak")]
        found.append("| " + " | ".join([*cells, f"{line['own_peak'] / line['peak']:.2f}"]) + " |")
    return "\n".join(found) + "\n"


def format_summary(data: dict[str, list[dict[str, Any]]]) -> str:
    """Return the README's table: of each benchmark and kind of rows the way that is the fastest beside slimtune."""
    found = ["| a step of | rows | beside | time : slimtune's | its memory |", "| --- | --- | --- | ---: | ---: |"]
    for name, title in SUMMARY.items():
        for rows in dict.fromkeys(line["rows"] for line in data[name]):
            best = min((line for line in data[name] if line["rows"] == rows), key=lambda line: line["seconds"])
            took, own, memory = best["seconds"], best["own_seconds"], best["own_peak"] / best["peak"]
            times = f"{took:.2f} s : {own:.2f} s = **{took / own:.2f}×**"
            found.append(f"| {title} | {rows[0].lower()}{rows[1:]} | {best['way']} | {times} | {memory:.2f} |")
    return "\n".join(found) + "\n"


def make_page(page: str) -> str:
    """Return the page with its tables."""
    text, data = (ROOT / page).read_text(encoding="utf-8"), json.loads(DATA.read_text())
    for name in PAGES[page]:
        begin = BEGIN.format(name=name)
        before, _, rest = text.partition(begin)
        table = format_summary(data) if name == "summary" else format_table(data[name])
        text = f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    folder = parser.parse_args().record
    if folder:
        DATA.write_text(json.dumps(record(folder), indent=1) + "\n")
    for page in PAGES:
        (ROOT / page).write_text(make_page(page), encoding="utf-8")
