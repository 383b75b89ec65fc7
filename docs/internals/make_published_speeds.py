"""Write the published serving speeds: the tables in slimtune/planning and docs/published_speeds.md.

    python docs/internals/make_published_speeds.py

The tables come from benchmarks/data; the page has the figures of the fits by group and side of the split.
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import published_serving as published  # noqa: E402

PLANNING = ROOT / "src/slimtune/planning"
PAGE = ROOT / "docs/published_speeds.md"
TEXT = """# Published serving speeds

The speeds that `slimtune plan MODEL --serve` and `choose` print are fitted to runs that others published
([how](plan.md)). `slimtune benchmarks` lists {count} of them, of {gpus} GPUs and Macs; `--sources` says where each
was published.

The runs of llama.cpp and Ollama were split by source before any fit: an author, a site or a repository is on one side
only. Sources of earlier fits are on the fit side; of the later ones a hash of the name decides, and six in ten are
held out (`benchmarks/published_serving.py`). A printed range is what held for sources left out of the fit one at a
time, so it is not made to hold on the held-out side. A range of fewer than six sources is as wide around their mean
as a t distribution of so few.

This is written by `python docs/internals/make_published_speeds.py`. An error is that of the middle of the range; high
/ low is the median width.

{groups}

The held-out side judged the ranges before those of few sources were made wider: 87 % of dense bases, 86 % of mixtures,
81 % (13 of 16) of hybrids and 85 % of prompts were inside, with median errors of 14, 13, 18 and 16 %. That is the
clean test: of hybrids fewer than the 85 % aimed at, and with a larger error than the 15 % aimed at. The ranges were
widened twice after it, on the fit side's figures, and three of them (hybrids, per-layer embeddings, Strix Halo) were
given another middle, while the held-out figures were seen. So the table above, which is of the ranges as they are now,
is no clean test of them.

A second set of {second_count} runs of {second_sources} further sources (`benchmarks/data/serving_points_second.json`)
was written down before any of them was predicted, when all of the above was done. As the ranges were then, 91 % of
dense bases, 90 % of mixtures, 81 % of hybrids and 100 % of prompts were inside, with median errors of 13, 21, 14 and
12 %: that is a clean test. It missed the aim in two places: hybrids inside, and the error of mixtures. One source has
103 of the runs; of the other ten, 85 % of hybrids were inside, with a median error of 9 %. The runs outside are of
GPUs that one source measured (P100, V100, and small bases on H100 and newer), of Ollama's own engine for Qwen3.5 on a
Mac, which is half as fast as llama.cpp, and one of Ollama on an RTX 5090. Two faults were mended after it: a V100 has
stacked memory, and a P100 has no products of four integers. The table is of the ranges with these mended, so of those
two GPUs it is no clean test.

{second}

{hardware}

Where fewer than two sources are behind a range, `evidence` says "guessed": an A100 or H100, reading prompts on
unified memory (DGX Spark, Strix Halo) or a Pascal card, prompts of hybrids, and vLLM.
"""


def list_counted_points() -> list[dict[str, Any]]:
    """Return the points whose source was seen and that nothing excludes, of every engine."""
    other = json.loads((ROOT / "benchmarks/data/serving_points_other.json").read_text("utf-8"))
    points = [{**p, "held_out": published.is_held_out(p)} for p in published.POINTS]
    single = [{**p, "held_out": bool(p.get("held_out"))} for p in other if p.get("requests", 1) == 1]
    counted = [p for p in [*points, *single] if p["seen"] and "excluded" not in p]
    return sorted(counted, key=lambda p: (p["card"], p["model"], p["engine"], p["precision"], p["test"], p["tokens"]))


def make_tables() -> dict[Path, str]:
    """Return the tables by file."""
    points = list_counted_points()
    named = dict.fromkeys((p["source"], p["date"], p["held_out"]) for p in points)
    numbers = {key: number for number, key in enumerate(named, 1)}
    speeds = [
        {
            "gpu": p["card"], "model": p["model"], "engine": p["engine"], "precision": p["precision"],
            "test": p["test"], "tokens": p["tokens"], "tokens_per_second": p["tokens_per_second"],
            "source": numbers[p["source"], p["date"], p["held_out"]],
        }
        for p in points
    ]  # fmt: skip
    sources = [
        {"number": number, "source": source, "date": date, "held_out": "yes" if held_out else "no"}
        for (source, date, held_out), number in numbers.items()
    ]
    return {
        PLANNING / "published_speeds.csv": _format_csv(speeds),
        PLANNING / "published_speed_sources.csv": _format_csv(sources),
    }


def make_page() -> str:
    """Return the page; it plans every run, which takes a minute or two."""
    points, rows = list_counted_points(), [r for r in published.compare_points() if r["kind"][0] == "llama.cpp"]
    second = published.compare_points(published.SECOND_POINTS)
    return TEXT.format(
        second=published.make_second_table(second),
        second_count=len(second),
        second_sources=len({r["name"] for r in second}),
        count=len(points),
        gpus=len({p["card"] for p in points}),
        groups=published.make_group_table(rows),
        hardware=published.make_hardware_table(rows),
    )


def _format_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    for file, text in {**make_tables(), PAGE: make_page()}.items():
        file.write_text(text, encoding="utf-8")
