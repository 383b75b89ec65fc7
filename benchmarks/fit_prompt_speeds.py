"""Fit the prompt speeds of planning/serving_speed.py to published runs: `python fit_prompt_speeds.py`.

It prints the shares of the rates by engine and kind of hardware, the terms that all share, and how well fits that have
not seen a source hold for it, by the kind of hardware and of base: the median error, the factor that holds for nine in
ten runs, and the share of runs inside the ranges of serving_speed.py, which are made of these factors. Sources are left
out a twelfth at a time, by four ways of dealing them out.

A run counts half as much for each year of its age, as engines become faster, and the runs of a source on a kind of
hardware count together as the root of their number. Prompts of over 5,000 tokens are not fitted to, as attention takes
a part of their time that the formula leaves out. A share is drawn to that of its vendor, so that few runs do not decide
it alone.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from published_serving import (
    FIFTH_POINTS,
    FOURTH_POINTS,
    POINTS,
    SECOND_POINTS,
    THIRD_POINTS,
    count_batch_tokens,
    count_work_of,
    find_engine_and_precision,
    load_config_of,
    name_source,
    scale_file,
)
from scipy.optimize import minimize

from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.serving_speed import (
    EXPERT_BANDWIDTH_SHARE,
    KIND_PREFILL,
    PREFILL,
    get_serving_fit_key,
)

NEWEST, LONGEST, FOLDS, DEALS, DEVIATION = 2026.9, 5000, 12, 4, 0.15
TERMS = {"nvidia": 45.0, "amd": 45.0, "apple": 45.0, "mlx": 45.0, "layer": 1e4, "scan": 2e-6}
"""Where the fit begins: EXPERT_TOKENS by vendor and in MLX, LAYER_MACS, RECURRENT_TOKEN_S."""
VENDOR_SHARES = {"nvidia hbm": 0.22, "nvidia hbm3": 0.2, "apple m5": 2.2, "nvidia p100": 1.0, "nvidia pascal": 1.0,
                 "nvidia unified": 1.2}  # fmt: skip
"""What shares are drawn to; others: 1.6 for NVIDIA, 0.75 for AMD and Apple."""


def list_prompts() -> list[dict[str, Any]]:
    """Return the published prompts that were read by llama.cpp, Ollama or MLX, with what the formula needs of each."""
    other = json.loads((Path(__file__).parent / "data" / "serving_points_other.json").read_text(encoding="utf-8"))
    points = (*POINTS, *SECOND_POINTS, *THIRD_POINTS, *FOURTH_POINTS, *FIFTH_POINTS, *other)
    counted = [p for p in points if p["seen"] and "excluded" not in p and p.get("requests", 1) == 1]
    prompts = [p for p in counted if p["test"] == "prefill" and p["engine"] != "vllm"]
    fifth = {id(p) for p in FIFTH_POINTS}
    return [{**describe_prompt(p), "fifth": id(p) in fifth} for p in sorted(prompts, key=lambda p: p["model"])]


def describe_prompt(point: dict[str, Any]) -> dict[str, Any]:
    """Return what the formula needs of a published run."""
    engine, precision = find_engine_and_precision(point)
    _, weights, structure, _, file_bytes = count_work_of(point["model"], precision)
    gpu = require_gpu_by_name(point["card"])
    key = get_serving_fit_key(gpu, engine, PREFILL)
    batch, scale = count_batch_tokens(point, engine), scale_file(point, file_bytes)
    return {
        "key": key, "name": name_source(point["source"]), "kind": structure.kind, "tokens": point["tokens"],
        "year": int(point["date"][:4]) + (int(point["date"][5:7]) - 1) / 12, "speed": point["tokens_per_second"],
        "rate": point.get("core_share", 1) * gpu.rates[PREFILL[key].rate_dtype], "weights": weights,
        "term": "mlx" if engine == "mlx" else gpu.vendor,
        "experts": structure.expert_macs / batch / structure.expert_share,
        "layer": load_config_of(point["model"]).get_text_config().num_hidden_layers * structure.hidden_size,
        "scan": structure.recurrent_layers,
        "read": scale * structure.all_expert_bytes / batch / (EXPERT_BANDWIDTH_SHARE * gpu.bandwidth),
    }  # fmt: skip


class PromptSpeedFit:
    """The formula over all prompts; `x`: logarithms of the shares, and of the terms that all share."""

    def __init__(self, prompts: list[dict[str, Any]]) -> None:
        self.prompts, self.keys = prompts, sorted({p["key"] for p in prompts})
        self.key = np.array([self.keys.index(p["key"]) for p in prompts])
        self.term = np.array([list(TERMS).index(p["term"]) for p in prompts])
        columns = ("rate", "weights", "experts", "layer", "scan", "read", "speed")
        self.columns = {c: np.array([p[c] for p in prompts], float) for c in columns}
        shares = [VENDOR_SHARES.get(k[1], 1.6 if k[1].startswith("nvidia") else 0.75) for k in self.keys]
        self.start = np.log([*shares, *TERMS.values()])
        counts = Counter((p["name"], p["key"]) for p in prompts)
        self.age_weight = np.array([2.0 ** (p["year"] - NEWEST) for p in prompts])
        self.weight = self.age_weight / np.sqrt([counts[p["name"], p["key"]] for p in prompts])
        self.log_spread = np.log([max(PREFILL[p["key"]].spread, KIND_PREFILL[p["kind"]]) for p in prompts])
        self.weight *= np.array([p["tokens"] <= LONGEST for p in prompts])

    def compute_log_errors(self, x: np.ndarray) -> np.ndarray:
        """Return the logarithm of predicted by published speed for each prompt."""
        c, terms = self.columns, np.exp(x[len(self.keys) :])
        macs = c["weights"] + c["experts"] * terms[self.term] + c["layer"] * terms[4]
        seconds = 2 * macs / (np.exp(x[self.key]) * c["rate"]) + c["scan"] * terms[5] + c["read"]
        return -np.log(seconds * c["speed"])

    def fit(self, seen: np.ndarray) -> np.ndarray:
        """Return the numbers that fit some of the prompts best; large errors count by their size, not its square."""
        strength = np.where(np.arange(len(self.start)) < len(self.keys), 1.0, 0.3)

        def loss(x: np.ndarray) -> float:
            errors = np.sqrt(1 + (self.compute_log_errors(x) / DEVIATION) ** 2) - 1
            return float(DEVIATION * (self.weight * errors)[seen].sum() + (strength * (x - self.start) ** 2).sum())

        return np.asarray(minimize(loss, self.start, method="L-BFGS-B", options={"maxiter": 200}).x)

    def compute_left_out_log_errors(self) -> np.ndarray:
        """Return the errors of each prompt by fits that have not seen its source, a row for each way of dealing."""
        rows = []
        for deal in range(DEALS):
            hashes = [hashlib.sha256(f"cv{deal} {p['name']}".encode()).hexdigest() for p in self.prompts]
            fold = np.array([int(h, 16) % FOLDS for h in hashes])
            row = np.zeros(len(fold))
            for left_out in range(FOLDS):
                errors = self.compute_log_errors(self.fit(fold != left_out))
                row[fold == left_out] = errors[fold == left_out]
            rows.append(row)
        return np.array(rows)

    def format_row(self, name: str, some: list[int], errors: np.ndarray) -> str:
        """Return a row of a Markdown table: runs, sources, median error, what nine in ten hold, share inside."""
        sizes, weights = np.abs(errors[:, some]).ravel(), np.tile(self.age_weight[some], len(errors))
        order = np.argsort(sizes)
        index = np.searchsorted(weights[order].cumsum() / weights.sum(), 0.9)
        median = statistics.median(np.abs(np.exp(errors[:, some]) - 1).ravel())
        sources = len({self.prompts[i]["name"] for i in some})
        inside = (np.abs(errors[:, some]) <= self.log_spread[some]).mean()
        factor = math.exp(sizes[order][index])
        return f"| {name} | {len(some)} | {sources} | {100 * median:.0f} | {factor:.2f} | {100 * inside:.0f} |"


def main() -> None:
    fit = PromptSpeedFit(list_prompts())
    x, errors = fit.fit(np.ones(len(fit.prompts), bool)), fit.compute_left_out_log_errors()
    for key, share in zip(fit.keys, x, strict=False):
        print(f"{key}: {math.exp(share):.2f}")
    for term, number in zip(TERMS, x[len(fit.keys) :], strict=True):
        print(f"{term}: {math.exp(number):.3g}")
    print("\n| left out | runs | sources | median error % | nine in ten within | inside % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(fit.format_row("all", list(range(len(fit.prompts))), errors))
    print(fit.format_row("fifth set", [i for i, p in enumerate(fit.prompts) if p["fifth"]], errors))
    for field in ("kind", "key"):
        for name in sorted({p[field] for p in fit.prompts}):
            label = name if isinstance(name, str) else ", ".join(name)
            print(fit.format_row(label, [i for i, p in enumerate(fit.prompts) if p[field] == name], errors))


if __name__ == "__main__":
    main()
