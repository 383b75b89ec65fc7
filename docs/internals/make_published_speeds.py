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

**The clean test.** {sixth_count} runs of {sixth_sources} sources that are in no other file
(`benchmarks/data/serving_points_sixth.json`) were written down before any of them was predicted, and predicted once,
after the fits were done:

{sixth}

The aim is a median error of 15 % (prompts: 25 %) and 85 % of the runs inside: every group reached it. {intel_sixth}
runs on Intel's Arc are not counted: a plan gave no speed for them then.

**Intel's Arc** has fits of llama.cpp since, to those runs and {intel_fitted} more of {intel_sources} sources
(`benchmarks/data/serving_points_intel.json`, `python benchmarks/fit_intel_speeds.py`). Before any of the new runs was
predicted, a hash of their names held out seven sources, a third of all; they were predicted once, after the fit:

{intel_held_out}

The ranges are wide, a factor of 2.4 on both sides for writing and of 3 for prompts, as fits that have not seen a source
were off by as much. On one Arc Pro B70 llama.cpp's SYCL wrote twice as fast as its Vulkan and read prompts half as
fast; builds of one year differ, too. An integrated GPU is guessed, as the fit has one source of them.

**No fit.** vLLM on Intel's and Apple's GPUs has none: its range is from the slowest to the fastest of all fits of vLLM
and of this vendor. No share of runs inside is promised for it; the four runs of vLLM on Arc that were found
are inside. A plan says that vLLM does not run on Pascal, Volta, Vega 20 and RDNA 2, and that MLX is planned for Apple's
GPUs alone.

**Before that** {fifth_count} runs of {fifth_sources} sources (`benchmarks/data/serving_points_fifth.json`) were such a
test:

| group | runs | sources | median error % | inside % |
| --- | ---: | ---: | ---: | ---: |
| dense | 53 | 12 | 4 | 91 |
| mixtures | 40 | 13 | 10 | 92 |
| hybrids | 82 | 18 | 12 | 95 |
| prompts | 96 | 18 | 28 | 89 |
| vLLM: dense | 13 | 2 | 11 | 85 |
| vLLM: mixtures | 6 | 4 | 6 | 67 |
| vLLM: hybrids | 12 | 1 | 9 | 100 |

Decoding reached the aim in llama.cpp, Ollama and MLX; prompts were inside, their error was larger. The fit was too
slow for prompts of large mixtures on Strix Halo and an M2 Ultra (30 to 50 %) and of 8B bases on an RX 9070 XT (40
%), and too fast for bases below 5 billion parameters on an M2 Ultra and for dense ones on an M5 Max, which one source
ran. Four of the five dense runs outside are one RX 9070 XT, 26 % faster than planned. vLLM's fit is guessed; two of
its runs outside, Ministral 3 in bf16 on a DGX Spark, are faster than its memory could read bf16, and should have been
left out.

So prompts were fitted again, to this set, too (`python benchmarks/fit_prompt_speeds.py`). A run counts half as much for
each year of its age, as engines become faster: mixtures on Strix Halo read prompts faster since March 2026. An expert
fills the tiles of a kernel, which are small on Apple and large on NVIDIA. A recurrent layer goes from token to token,
which takes 1.6 µs on a small and a large GPU; before, hybrids had a share of the rate. A layer computes beside its
matrices, which slows small bases; RDNA 4 has a share of its own. By fits that have not seen a source, prompts of all
sources have a median error of 16 %, those of this set of 21 % (28 % before), and 93 and 94 % are inside. Time of a
prompt's attention, Ollama's slowdown, and experts that are read while others are computed made the error of sources
left out no smaller. The fifth set with these fits, no clean test any more:

{fifth}

**The fourth set**, {fourth_count} runs of {fourth_sources} sources (`benchmarks/data/serving_points_fourth.json`) on
28 kinds of machines, was such a test, too:

| group | runs | sources | median error % | inside % |
| --- | ---: | ---: | ---: | ---: |
| dense | 60 | 16 | 12 | 95 |
| mixtures | 23 | 9 | 22 | 78 |
| hybrids | 29 | 12 | 20 | 86 |
| prompts | 47 | 13 | 19 | 87 |

Dense bases and prompts reached the aim. Mixtures missed both, hybrids the error. All five mixtures outside, and two
of the four hybrids, are slower in MLX than the range: MLX's fit had no time for the router and the experts of a
layer. The other two are llama.cpp on an M5 Max, faster, and a build of it that computed Qwen3-Next slowly. The M5
reads prompts in llama.cpp three times as fast as was planned, by its units for matrices; an A30 has stacked memory.
So MLX has llama.cpp's terms now, their numbers fitted to the earlier runs; the M5 has a fit of its own in llama.cpp,
to runs of this set, too; and the width of the bus tells stacked memory. Later the numbers were fitted to all of these
sets at once, and this is the same set, no clean test any more:

{fourth}

What is left: on an M1 Max or M2 Max with fewer cores the middle is 10 to 45 % too fast, as the table has only the
chip with all of them; the RX 9070 XT runs bases below 2 billion parameters faster with Vulkan than the range.

**The fits** are to {fitted_count} runs of llama.cpp and Ollama and {mlx_count} of MLX, with these figures:

{groups}

MLX:

{mlx}

{hardware}

An author, a site or a repository is one source. A range is as wide, by a factor on both sides of the formula, as nine
in ten runs needed whose sources a twelfth of the fits had left out, by the kind of hardware and of base, whichever is
wider; one of fewer than six sources is wider than that. By such fits decoding had a median error of 9 % for dense
bases, 11 % for mixtures and for hybrids. Before, the two sides of a range differed, so that the middle
was 8 % too slow for mixtures and hybrids; in Ollama both were 18 % too fast. So Ollama has a time of its own (a tenth
longer, a mixture's 22 %), a layer with an embedding of its own counts 1.45 layers, a layer on an RTX 50 takes less, and
MLX computes 2,048 tokens of a prompt at once. Qwen3.5 in Ollama has a wider range than in llama.cpp: Ollama computes it
in an engine of its own, which in some versions takes 0.4 ms longer for each recurrent layer, up to half the speed.

Three earlier tests: fits to some of these sources had, of the others, 87 % of dense bases, 86 % of mixtures, 81 % of
hybrids and 85 % of prompts inside, with median errors of 14, 13, 18 and 16 %; a second set, 91, 90, 81 and 100 %, and
13, 21, 14 and 12 %; a third, of {third_count} runs of {third_sources} sources, 72, 100, 88 and 90 %, and 13, 6, 13 and
24 %. Its dense bases outside were all on one MI50, after which AMD's datacentre GPUs were given a fit of their own,
guessed. What the tests missed was looked at source by source. More
terms of the formula (experts' share of the bandwidth, time of a token, hidden size) made the error of sources left out
no smaller: mixtures differ by builds, drivers and power limits. What did: Hopper and Blackwell with stacked memory
apart from the A100, short convolutions apart from recurrent layers, Ollama's engine, and the P100's own fit, which was
not used.

Where fewer than two sources are behind a range, a plan says "guessed" and why: AMD's datacentre GPUs, reading prompts
on an H100 or on a Pascal card, Intel's integrated GPUs, and vLLM. No range of writing ends above the bandwidth.
"""


def list_counted_points() -> list[dict[str, Any]]:
    """Return the points whose source was seen and that nothing excludes, of every engine."""
    other = json.loads((ROOT / "benchmarks/data/serving_points_other.json").read_text("utf-8"))
    single = [p for p in other if p.get("requests", 1) == 1]
    points = [{**p, "held_out": False} for p in [*published.POINTS, *published.SECOND_POINTS, *single]]
    points += [{**p, "held_out": False} for p in (*published.THIRD_POINTS, *published.FOURTH_POINTS)]
    # Prompts of the fifth set are fitted to.
    points += [{**p, "held_out": p["test"] == "decode" or p["engine"] == "vllm"} for p in published.FIFTH_POINTS]
    points += [{**p, "held_out": not published.is_on_intel(p)} for p in published.SIXTH_POINTS]
    points += published.INTEL_POINTS
    counted = [p for p in points if p["seen"] and "excluded" not in p]
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
    points = list_counted_points()
    rows = published.compare_points([p for p in points if not p["held_out"]])
    rows, mlx = ([r for r in rows if r["kind"][0] == engine] for engine in ("llama.cpp", "mlx"))
    others = [r for r in rows if not published.is_on_intel(r)]
    intel = [p for p in published.INTEL_POINTS if p["engine"] != "vllm" and "excluded" not in p]
    intel_fitted = [p for p in intel if not p["held_out"]]
    intel_held_out = published.compare_points([p for p in intel if p["held_out"]])
    fourth = published.compare_points(published.FOURTH_POINTS)
    fifth = [p for p in published.FIFTH_POINTS if p["seen"]]
    sixth = [p for p in published.SIXTH_POINTS if p["engine"] != "vllm"]
    judging = [p for p in sixth if not published.is_on_intel(p)]
    return TEXT.format(
        sixth=published.make_group_table(published.compare_points(judging)),
        sixth_count=len(sixth),
        sixth_sources=len({published.name_source(p["source"]) for p in sixth}),
        intel_sixth=len(sixth) - len(judging),
        intel_fitted=len(intel_fitted),
        intel_sources=len({published.name_source(p["source"]) for p in intel_fitted}),
        intel_held_out=published.make_hardware_table(intel_held_out),
        fifth_count=len(fifth),
        fifth_sources=len({published.name_source(p["source"]) for p in fifth}),
        fifth=published.make_group_table([r for r in published.compare_points(fifth) if r["kind"][0] != "vllm"]),
        fourth=published.make_group_table(fourth),
        fourth_count=len(fourth),
        fourth_sources=len({r["name"] for r in fourth}),
        third_count=len(published.THIRD_POINTS),
        third_sources=len({published.name_source(p["source"]) for p in published.THIRD_POINTS}),
        fitted_count=len(others),
        mlx_count=len(mlx),
        mlx=published.make_group_table(mlx),
        count=len(points),
        gpus=len({p["card"] for p in points}),
        groups=published.make_group_table(others),
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
