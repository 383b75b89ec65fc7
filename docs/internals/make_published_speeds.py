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

This is written by `python docs/internals/make_published_speeds.py`. An error is that of the middle of the range; high
/ low is the median width.

**The clean test.** {third_count} runs of {third_sources} sources that are in no other file
(`benchmarks/data/serving_points_third.json`) were written down before any of them was predicted, when all fits and
ranges were done, and predicted once:

| group | median error % | inside % |
| --- | ---: | ---: |
| dense | 13 | 72 |
| mixtures | 6 | 100 |
| hybrids | 13 | 88 |
| prompts | 24 | 90 |

The aim is a median error of 15 % (prompts: 25 %) and 85 % of the runs inside. It was missed by dense bases inside: all
five runs outside are of one source, of an MI50, whose stacked memory llama.cpp uses half as well as that of other GPUs
by AMD; of the other six sources, all 13 are inside. Three of the 25 runs of hybrids are faster than the range, all on
an RTX 5090; the middle for prompts of mixtures is up to twice too fast on a slim workstation card, and too slow on an
M5. After it, AMD's datacentre GPUs were given a fit of their own, guessed, so that of them this is the table but no
clean test:

{third}

**The fits** are to {fitted_count} further runs, with these figures:

{groups}

{hardware}

An author, a site or a repository is one source. A range is what held for sources left out of the fit one at a time, by
the kind of hardware and of base, whichever is wider; one of fewer than six sources is as wide around their mean as a t
distribution of so few. Qwen3.5 in Ollama has a wider range than in llama.cpp: Ollama computes it in an engine of its
own, which in some versions takes 0.4 ms longer for each recurrent layer, up to half the speed.

Two earlier tests: fits to some of these sources had, of the others, 87 % of dense bases, 86 % of mixtures, 81 % of
hybrids and 85 % of prompts inside, with median errors of 14, 13, 18 and 16 %; a second set, 91, 90, 81 and 100 %, and
13, 21, 14 and 12 %. What they missed (hybrids inside, the error of mixtures) was looked at source by source. More
terms of the formula (experts' share of the bandwidth, time of a token, hidden size) made the error of sources left out
no smaller: mixtures differ by builds, drivers and power limits. What did: Hopper and Blackwell with stacked memory
apart from the A100, short convolutions apart from recurrent layers, Ollama's engine, and the P100's own fit, which was
not used.

Where fewer than two sources are behind a range, `evidence` says "guessed": AMD's datacentre GPUs, reading prompts on
an H100 or on a Pascal card, prompts of bases with per-layer embeddings (Gemma 3n and 4 E), and vLLM.
"""


def list_counted_points() -> list[dict[str, Any]]:
    """Return the points whose source was seen and that nothing excludes, of every engine."""
    other = json.loads((ROOT / "benchmarks/data/serving_points_other.json").read_text("utf-8"))
    # Of MLX the first split holds; the fits of the other engines have seen all but the third set.
    points = [{**p, "held_out": p["engine"] == "mlx" and published.is_held_out(p)} for p in published.POINTS]
    points += [{**p, "held_out": False} for p in published.SECOND_POINTS]
    points += [{**p, "held_out": True} for p in published.THIRD_POINTS]
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
    third = published.compare_points(published.THIRD_POINTS)
    return TEXT.format(
        third=published.make_group_table(third),
        third_count=len(third),
        third_sources=len({r["name"] for r in third}),
        fitted_count=len(rows),
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
