"""Published training speeds beside what `slimtune plan` says of such runs: `python published_hours.py`.

Each point of data/pace_points.json (so far of its first 32) is a run that somebody else published: its step is
traced as ours, and the roofline of planning/throughput.py gives its hours. Where a run was compiled, operators without
arithmetic are taken as fused: a fifth of their traffic is left, and no launches. An error is that of the hours at the
middle of the range. The range (`UTILIZATION`) is where nine in ten of these runs lie, so it is no test of them: the
last line is one, where each source in turn is left out and predicted by the median share of the others.

Exit code 1: a median error of 15 % or more, or less than 90 % of the runs inside the range.
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from slimtune import LoraConfig
from slimtune.core.adapters.method_registry import get_method_config_class
from slimtune.extras.known_models import load_known_models_by_alias
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.meta_model import build_adapted_meta_model
from slimtune.planning.plan_request import MicroBatchWorkload
from slimtune.planning.plan_result import TrainingWorkload
from slimtune.planning.throughput import UTILIZATION, estimate_training_speed

TABLE = json.loads((Path(__file__).parent / "data" / "pace_points.json").read_text(encoding="utf-8"))
EARLIER_POINTS = 32
"""The first points of the file, which `UTILIZATION` was set by; the others came later, and no fit has seen them."""
WORK_FIELDS = ("model", "rank", "targets", "last_layers", "lengths", "checkpointing", "quantization")
MEDIAN, INSIDE = 0.15, 0.9
"""The largest median error, and the least share of runs inside the printed range."""
MILLION = 1e6
ONE_TILE = 1 << 20
"""A tile longer than any row: norms and MLPs run as transformers has them, as in the published runs."""


def name_author(source: str) -> str:
    """Return who published a point: of GitHub the owner of the repository, else the first word."""
    found = re.match(r"(?:gist\.)?github\.com/([\w.-]+)/", source)
    # The paper on LLaMA-Factory is by the owner of its repository.
    return found[1] if found else source.split()[0].replace("arXiv", "hiyouga")


EARLIER_AUTHORS = {name_author(p["source"]) for p in TABLE["points"][:EARLIER_POINTS]}


def is_held_out(point: dict[str, Any]) -> bool:
    """Return whether a point judges the range and no fit may see it.

    A hash of its author's name decides, drawn before any error was looked at: four in ten of the later authors. The 0
    in the hashed text is the first seed that holds out full fine-tuning, LoRA, QLoRA, NVIDIA's GPUs and Apple's.
    """
    name = name_author(point["source"])
    return name not in EARLIER_AUTHORS and int(hashlib.sha256(f"0 {name}".encode()).hexdigest(), 16) % 10 < 4


def name_kind_of_training(point: dict[str, Any]) -> str:
    """Return what a point trains: full, LoRA or QLoRA."""
    return "full" if "rank" not in point else "QLoRA" if "quantization" in point else "LoRA"


@cache
def trace_work(point_json: str, device: Any, dtype: torch.dtype) -> tuple[Counter[Any], int]:
    """Return the operators of a published job's micro-batch, and the bytes its optimizer step moves."""
    point = json.loads(point_json)
    shapes = TABLE["models"].get(point["model"]) or load_known_models_by_alias()[point["model"]]["config"]
    layers = shapes["num_hidden_layers"]

    def trace(depth: int, last: int) -> tuple[Counter[Any], int]:
        """Trace so many layers, the last of them adapted."""
        config = AutoConfig.for_model(**shapes | {"num_hidden_layers": depth, "max_position_embeddings": 16384})
        method: Any = get_method_config_class("full")()
        if "rank" in point:
            only = None if last == depth else list(range(depth))[-last:]
            method = LoraConfig(r=point["rank"], target_modules=point["targets"], layers_to_transform=only,
                                task_type="CAUSAL_LM")  # fmt: skip
        options: dict[str, Any] = {
            "gradient_checkpointing": point["checkpointing"],
            "quantization": point.get("quantization"),
            "mlp_tile_size": ONE_TILE,
        }
        job = MicroBatchWorkload(config, method, dtype, tuple(point["lengths"]), device=device, **options)
        # The published full fine-tuning trains the base's own weights, ours fp32 copies of them.
        savings = {"checkpointing": point["checkpointing"], "tile": ONE_TILE}
        plain = None if "rank" in point else build_adapted_meta_model(config, None, dtype, **savings)
        found = trace_training_step(job, plain)
        trained = found.state_bytes_by_part.get("adapters") or found.state_bytes_by_part["weights"]
        return found.counts_by_operator_cost, 2 * found.state_bytes_by_part["optimizer"] + 5 * trained

    # Every adapted layer but the first is alike, and so is every one below them.
    (one, first), (two, second) = trace(1, 1), trace(2, 2)
    adapted = point.get("last_layers", layers)
    work = Counter({k: one[k] + (adapted - 1) * (two[k] - one[k]) for k in one | two})
    if below := layers - adapted:
        lower, _ = trace(2, 1)
        work = Counter({k: work[k] + below * (lower[k] - one[k]) for k in work | lower})
    return work, first + (adapted - 1) * (second - first)


def compare_points() -> list[dict[str, Any]]:
    """Return the points, each with its planned range, the error of the middle, and the share of the roofline."""
    rows = []
    for point in TABLE["points"][:EARLIER_POINTS]:
        gpu = require_gpu_by_name(point["card"])
        key = json.dumps({k: point[k] for k in WORK_FIELDS if k in point})
        dtype = torch.bfloat16 if gpu.bf16 else torch.float16
        work, optimizer_step_bytes = trace_work(key, gpu.device, dtype)
        if point["compiled"]:
            traffic = sum(moved * n for (operations, moved, _), n in work.items() if not operations)
            fused = {(0, traffic // 5, torch.bfloat16): 1}
            work = Counter({k: n for k, n in work.items() if k[0]}) + Counter(fused)
        band = estimate_training_speed(
            TrainingWorkload(
                work, {}, sum(point["lengths"]), optimizer_step_bytes, micro_batches_per_step=point["passes"]
            ),
            gpu,
        )
        assert band is not None
        real = point["tokens_per_second"]
        error = real / (band.low * band.high) ** 0.5 - 1  # of the hours
        share = real / band.high * UTILIZATION.high
        rows.append({**point, "band": band, "error": error, "share": share, "inside": band.low <= real <= band.high})
    return rows


def summarize(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the median error, and the share of runs inside the range."""
    return statistics.median(abs(r["error"]) for r in rows), sum(r["inside"] for r in rows) / len(rows)


def left_out_errors(rows: list[dict[str, Any]]) -> list[float]:
    """Return the error of each run, predicted by the median share of the runs from other sources."""
    return [r["share"] / statistics.median(o["share"] for o in rows if o["source"] != r["source"]) - 1 for r in rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = compare_points()
    print("| GPU | model | trains | rows | published h | planned h | error % | inside |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for r in rows:
        trains = f"LoRA r={r['rank']}" if "rank" in r else "all"
        hours, fast, slow = (MILLION / rate / 3600 for rate in (r["tokens_per_second"], r["band"].high, r["band"].low))
        shape = f"{len(r['lengths'])} × {r['lengths'][0]}"
        print(f"| {r['card']} | {r['model']} | {trains} | {shape} | {hours:.3f} | {fast:.3f} to {slow:.3f} "
              f"| {100 * r['error']:+.0f} | {('no', 'yes')[r['inside']]} |")  # fmt: skip
    median, inside = summarize(rows)
    left_out = statistics.median(map(abs, left_out_errors(rows)))
    print(f"\nHours, {len(rows)} runs: median error {100 * median:.1f} %, {100 * inside:.0f} % inside.")
    print(f"Left out by source: median error {100 * left_out:.1f} %.")
    sys.exit(not (median < MEDIAN and inside >= INSIDE))


if __name__ == "__main__":
    main()
