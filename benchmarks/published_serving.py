"""Published serving speeds beside what `slimtune plan --serve` says of them: `python published_serving.py`.

Each point of data/serving_points.json is a run that somebody else published: engine, card, model, precision, whether
it decodes or reads a prompt, the tokens in the context (decoding) or in the prompt, tokens a second, source, date;
`file_gib`, where the file's mixture of types has no name; `ubatch`, where it is not llama.cpp's own.
Points with `"seen": false`, whose source was not found, and those with `excluded`, a reason, are shown and not counted.
The fits of planning/serving_speed.py are to them and to those of data/serving_points_second.json,
data/serving_points_third.json and data/serving_points_fourth.json, which judged earlier fits, and of runs of MLX to
those of data/serving_points_other.json. Those of data/serving_points_fifth.json judged the fits of all of these; of
them, prompts alone are fitted to since (fit_prompt_speeds.py). Those of data/serving_points_sixth.json judge the fits,
which have not seen them, but for those on Intel's Arc: to these and to data/serving_points_intel.json the fits of Intel
are (fit_intel_speeds.py), except to the sources in it that a hash of their names held out, a third of all, before any
of its runs was predicted. SYCL and Vulkan count there as two.

What counts in the fourth was decided before any of it was predicted: one GPU or Mac that holds all weights, one
request, no speculative decoding, a precision that is named, llama.cpp, Ollama, LM Studio or MLX themselves, a date.
Of a source and a machine each base, precision and engine once, the first that is listed: decoding at the shortest
published context, prompts nearest 512 tokens, of at least 256; of a group at most four, evenly spread over the
source's own order. UD-Q4_K_XL counts as Q4_K_M, likewise Q6 and Q8. Left out are speeds by the clock of whole requests,
tokens guessed from words, cached prompts, rounded "about" speeds, speeds above the memory's bandwidth, laptops on
battery or throttled, and runs reported as a defect.

The fifth has all such runs of a source, none left out to even the groups, and runs of vLLM, which count apart. Its
prompts are those nearest 512 tokens by their ratio, the longer of two. Left out, too, are forks of llama.cpp, caches of
keys in formats of a fork, speeds whose spread is above a tenth, and vLLM's prompts, which clients timed.

The exit code leaves out the runs of MLX and two of vLLM in the first file.
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from slimtune.extras.known_models import load_known_models_by_alias
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.meta_model import build_adapted_meta_model
from slimtune.planning.serving_cache import count_recurrent_state_bytes, count_request_kv_cache_bytes
from slimtune.planning.serving_memory import (
    count_weight_and_embedding_bytes,
    count_weight_bytes_and_macs_per_token,
    describe_layer_structure,
)
from slimtune.planning.serving_speed import (
    BATCH_TOKENS,
    MLX_BATCH_TOKENS,
    estimate_decode_and_prefill_speed,
    get_serving_fit_hardware_key,
)
from slimtune.planning.weight_formats import ENGINES

POINTS = json.loads((Path(__file__).parent / "data" / "serving_points.json").read_text(encoding="utf-8"))
SECOND_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_second.json").read_text(encoding="utf-8"))
"""Runs of further sources, which judged the first fits and are fitted to since."""
THIRD_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_third.json").read_text(encoding="utf-8"))
"""Runs of sources that were collected after all of these, and written down before any of them was predicted."""
FOURTH_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_fourth.json").read_text(encoding="utf-8"))
"""The same, collected after the fits were changed by what the third showed."""
FIFTH_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_fifth.json").read_text(encoding="utf-8"))
"""The same, collected after the fits were changed by what the fourth showed."""
SIXTH_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_sixth.json").read_text(encoding="utf-8"))
"""The same, collected while prompts were fitted to the fifth, too."""
INTEL_POINTS = json.loads((Path(__file__).parent / "data" / "serving_points_intel.json").read_text(encoding="utf-8"))
"""Runs on Intel's Arc, to which the fits of llama.cpp on Intel are, except those with `"held_out": true`."""
EARLIER_POINTS = 249
"""The first points of the file, to which the first fits were made."""
GROUPS = ("dense", "mixtures", "hybrids", "prompts")
MEDIAN, PROMPT_MEDIAN, INSIDE = 0.15, 0.25, 0.85
"""The largest median errors, and the least share of runs inside the printed range, of each group."""

HYBRIDS = ("qwen3_5", "qwen3_next", "nemotron_h", "granitemoehybrid", "falcon_h1", "lfm2")
"""Types of config whose layers are not all attention."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Fields of a config that tell a mixture."""
AUTHORS = {
    "JohannesGaessler": {"4766", "15131", "15525", "15631", "17505", "24127", "25441"},
    "arthw": {"12035", "22291", "22413", "23725"},
}
"""Threads of llama.cpp whose runs are by one author, on the same machines."""


def name_source(text: str) -> str:
    """Return the author, site or repository that a point's source is of.

    Of GitHub and Hugging Face it is the owner, and of the repositories of llama.cpp and Intel the author or the thread.
    """
    github = re.match(r"(?:github\.com|gist\.github\.com|huggingface\.co/datasets)/([\w.-]+)(/[\w.-]+)?", text)
    if github is None:
        first = text.split(" ")[0]
        return first.split("/")[0] if "." in first else text
    if github[1] not in ("ggml-org", "intel"):
        return github[1]
    thread = re.search(r"(?:pull request|discussion|issue) (\d+)", text)
    if thread is None:
        return f"{github[1]}{github[2]} benches"
    return next((name for name, some in AUTHORS.items() if thread[1] in some), f"{github[1]}{github[2]} {thread[1]}")


EARLIER_SOURCES = {name_source(point["source"]) for point in POINTS[:EARLIER_POINTS]}
"""Sources of the first fits, which cannot judge a later one."""


def is_held_out(point: dict[str, Any]) -> bool:
    """Return whether a point judged the first fits of llama.cpp and of MLX.

    A hash of its source's name decides, drawn before any error was looked at. Six in ten of the later sources are held
    out; the 6 in the hashed text is the first seed that leaves five sources on both sides of each group.
    """
    name = name_source(point["source"])
    return name not in EARLIER_SOURCES and int(hashlib.sha256(f"6 {name}".encode()).hexdigest(), 16) % 10 < 6


def get_group(point: dict[str, Any]) -> str:
    """Return the group that figures are given for: prompts, or decoding of dense bases, mixtures or hybrids."""
    if point["test"] == "prefill":
        return "prompts"
    text = load_config_of(point["model"]).get_text_config()
    if text.model_type.startswith(HYBRIDS):
        return "hybrids"
    return "mixtures" if any(getattr(text, name, None) for name in EXPERT_COUNTS) else "dense"


@cache
def load_config_of(name: str) -> Any:
    return AutoConfig.for_model(**load_known_models_by_alias()[name]["config"])


@cache
def model_of(name: str) -> Any:
    return build_adapted_meta_model(load_config_of(name), None, torch.bfloat16)


@cache
def count_work_of(name: str, precision: str) -> tuple[float, float, Any, int, int]:
    """Return bytes and numbers of a token, the structure of the layers, the bytes of a state, and those of the file."""
    model = model_of(name)
    read_bytes, weights = count_weight_bytes_and_macs_per_token(model, precision)
    structure, state = describe_layer_structure(model, precision), count_recurrent_state_bytes(model)
    return read_bytes, weights, structure, state, count_weight_and_embedding_bytes(model, precision)[0]


def find_engine_and_precision(point: dict[str, Any]) -> tuple[str, str]:
    """Return the engine and the precision by which a plan knows those of a published run."""
    engine = point["engine"] if point["engine"] in ENGINES else "llama.cpp"
    names = {} if engine == "vllm" else {"BF16": "F16", "mxfp4": "mxfp4-q8"}
    return engine, names.get(point["precision"], point["precision"])


def count_batch_tokens(point: dict[str, Any], engine: str) -> int:
    """Return how many tokens of a published prompt an engine computes at once."""
    return min(point["tokens"], point.get("ubatch", MLX_BATCH_TOKENS if engine == "mlx" else BATCH_TOKENS))


def scale_file(point: dict[str, Any], file_bytes: float) -> float:
    """Return the size of a published file as a multiple of the one that is planned; a mixture of types has no name."""
    return point["file_gib"] * 2**30 / file_bytes if "file_gib" in point else 1.0


def predict(point: dict[str, Any]) -> Interval:
    """Return the tokens a second that a plan gives for a published run."""
    model, decodes = model_of(point["model"]), point["test"] == "decode"
    engine, precision = find_engine_and_precision(point)
    read_bytes, weights, structure, state, file_bytes = count_work_of(point["model"], precision)
    scale = scale_file(point, file_bytes)
    structure = structure._replace(all_expert_bytes=scale * structure.all_expert_bytes)
    # The cache is allocated in blocks, and read as far as it is full.
    length = 256 * max(1, -(-point["tokens"] // 256))
    cached = count_request_kv_cache_bytes(model.config, length, engine, "f16") * point["tokens"] / length + state
    gpu = require_gpu_by_name(point["card"])
    if "core_share" in point:  # a version with fewer cores than that of the table
        gpu = replace(gpu, rates={d: point["core_share"] * rate for d, rate in (gpu.rates or {}).items()})
    text = model.config.get_text_config()
    speed = estimate_decode_and_prefill_speed(
        gpu, engine, weight_bytes_per_token=scale * read_bytes, kv_bytes_per_request=cached if decodes else 0,
        matmul_weight_count=weights, layers=text.num_hidden_layers, vocab_size=text.vocab_size,
        structure=structure, batch_tokens=count_batch_tokens(point, engine),
    )  # fmt: skip
    if speed is None:
        raise ValueError(f"no fit for {point['card']} and {point['engine']}")
    return speed.decode if decodes else speed.prefill


def is_on_intel(point: dict[str, Any]) -> bool:
    """Return whether a run is on a GPU by Intel, whose fits are to the sixth set, too; so it does not judge them."""
    return require_gpu_by_name(point["card"]).vendor == "intel"


def compare_points(points: Sequence[dict[str, Any]] = (*POINTS, *SECOND_POINTS)) -> list[dict[str, Any]]:
    """Return the points that count, each with its predicted range, the error of the middle, and the hardware kind."""
    rows = []
    for point in points:
        if not point["seen"] or "excluded" in point:
            continue
        band = predict(point)
        # The middle of a range of speeds, whose ends are factors.
        error = (band.low * band.high) ** 0.5 / point["tokens_per_second"] - 1
        inside = band.low <= point["tokens_per_second"] <= band.high
        engine = point["engine"] if point["engine"] in ("vllm", "mlx") else "llama.cpp"
        kind = (engine, get_serving_fit_hardware_key(require_gpu_by_name(point["card"])), point["test"])
        more = {"group": get_group(point), "name": name_source(point["source"])}
        rows.append({**point, **more, "band": band, "error": error, "inside": inside, "kind": kind})
    return rows


def summarize(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the median error, and the share of runs inside the range."""
    return statistics.median(abs(r["error"]) for r in rows), sum(r["inside"] for r in rows) / len(rows)


def make_group_table(rows: list[dict[str, Any]]) -> str:
    """Return the figures of each group as a Markdown table."""
    lines = [
        "| group | runs | sources | median error % | inside % | high / low |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in GROUPS:
        lines.append(f"| {group} | {_format_figures([r for r in rows if r['group'] == group])} |")
    return "\n".join(lines)


def _format_figures(rows: list[dict[str, Any]]) -> str:
    median, inside = summarize(rows)
    sources = len({r["name"] for r in rows})
    width = statistics.median(r["band"].high / r["band"].low for r in rows)
    return f"{len(rows)} | {sources} | {100 * median:.0f} | {100 * inside:.0f} | {width:.1f}"


def make_hardware_table(rows: list[dict[str, Any]]) -> str:
    """Return the figures of each kind of hardware as a Markdown table."""
    lines = [
        "| hardware | test | runs | sources | median error % | inside % |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in sorted({r["kind"][1:] for r in rows}):
        some = [r for r in rows if r["kind"][1:] == kind]
        median, inside = summarize(some)
        sources = len({r["name"] for r in some})
        lines.append(f"| {kind[0]} | {kind[1]} | {len(some)} | {sources} | {100 * median:.0f} | {100 * inside:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = compare_points()
    print("| engine | GPU | model | precision | test | published t/s | planned t/s | error % | inside |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for r in rows:
        test = f"{r['test']} {r['tokens']}"
        print(
            f"| {r['engine']} | {r['card']} | {r['model']} | {r['precision']} | {test} | {r['tokens_per_second']:.1f} "
            f"| {r['band'].low:.0f} to {r['band'].high:.0f} | {100 * r['error']:+.0f} | {('no', 'yes')[r['inside']]} |"
        )
    counted = [r for r in rows if r["kind"][0] == "llama.cpp"]
    third, fourth = compare_points(THIRD_POINTS), compare_points(FOURTH_POINTS)
    fifth = [r for r in compare_points(FIFTH_POINTS) if r["kind"][0] != "vllm"]
    sixth = compare_points([p for p in SIXTH_POINTS if p["engine"] != "vllm" and not is_on_intel(p)])
    tables = [*map(make_group_table, (counted, third, fourth, fifth, sixth)), make_hardware_table(counted)]
    print("", *tables, sep="\n\n", end="\n\n")
    for point in POINTS:
        if not point["seen"] or "excluded" in point:
            print(f"not counted: {point['card']} {point['model']}: {point.get('excluded', 'its source was not found')}")
    sys.exit(not all(is_good(third, group) for group in GROUPS))


def is_good(rows: list[dict[str, Any]], group: str) -> bool:
    """Return whether a group's median error and its share inside are as they should be."""
    median, inside = summarize([r for r in rows if r["group"] == group])
    return median <= (PROMPT_MEDIAN if group == "prompts" else MEDIAN) and inside >= INSIDE


if __name__ == "__main__":
    main()
