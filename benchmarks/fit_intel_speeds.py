"""Fit the speeds of llama.cpp on Intel's GPUs in planning/serving_speed.py: `python fit_intel_speeds.py`.

The points are those of data/serving_points_sixth.json and data/serving_points_intel.json on Intel's Arc, without those
that are held out. Both backends, SYCL and Vulkan, are in them, as a plan does not know which one will run. The runs of
a source count together as the root of their number; the error of each is its logarithm. A spread is the factor that
holds for nine in ten runs, so weighted, whose source a fit has not seen.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
from published_serving import INTEL_POINTS, SIXTH_POINTS, get_group, name_source, predict

from slimtune.planning import serving_speed
from slimtune.planning.gpu_specs import require_gpu_by_name

KEYS = (("llama.cpp", "intel"), ("llama.cpp", "intel unified"))
SHARES = np.arange(0.30, 1.001, 0.01)
LAYER_MICROSECONDS = np.arange(0, 401, 5)
PROMPT_SHARES = np.exp(np.arange(math.log(0.3), math.log(5.0), 0.01))


def list_points(test: str) -> list[dict[str, Any]]:
    """Return the published runs of a test that are fitted to."""
    points = [p for p in (*SIXTH_POINTS, *INTEL_POINTS) if require_gpu_by_name(p["card"]).vendor == "intel"]
    fitted = [p for p in points if p["seen"] and "excluded" not in p and not p.get("held_out")]
    return [p for p in fitted if p["test"] == test and p["engine"] == "llama.cpp"]


def compute_seconds(point: dict[str, Any], share: float, layer_s: float = 0.0) -> float:
    """Return the seconds of a token by the formula with a share and a time of a layer."""
    for key in KEYS:
        serving_speed.DECODING[key] = serving_speed.DecodingSpeedFit(share, layer_s, 1.0, 2)
        serving_speed.PREFILL[key] = serving_speed.PrefillSpeedFit(share, "float32", 1.0, 2)
    for spreads in (serving_speed.KIND_DECODING, serving_speed.KIND_PREFILL):
        spreads.update(dict.fromkeys(spreads, 1.0))
    return 1 / predict(point).low


def fit(points: list[dict[str, Any]], seconds: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Return where in `seconds`, of shape (…, points), the weighted error is least, and the weights of the points."""
    counts = Counter(name_source(p["source"]) for p in points)
    weights = np.array([counts[name_source(p["source"])] ** -0.5 for p in points])
    published = np.array([p["tokens_per_second"] for p in points])
    errors = (weights * np.abs(np.log(seconds * published))).sum(-1)
    return np.unravel_index(int(errors.argmin()), errors.shape), weights


def main() -> None:
    for test in ("decode", "prefill"):
        points = list_points(test)
        if test == "decode":
            whole = np.array([compute_seconds(p, 1.0) for p in points])
            layer = np.array([compute_seconds(p, 1.0, 1e-4) for p in points]) - whole
            seconds = whole / SHARES[:, None, None] + layer * LAYER_MICROSECONDS[:, None] / 100
        else:
            # What a layer scans and what is read of the experts does not depend on the share.
            whole, half = (np.array([compute_seconds(p, share) for p in points]) for share in (1.0, 2.0))
            seconds = 2 * half - whole + 2 * (whole - half) / PROMPT_SHARES[:, None]
        best, weights = fit(points, seconds)
        names = np.array([name_source(p["source"]) for p in points])
        published = np.array([p["tokens_per_second"] for p in points])
        errors = np.zeros(len(points))
        for name in set(names):
            rest = [p for p, other in zip(points, names, strict=True) if other != name]
            without, _ = fit(rest, seconds[..., names != name])
            errors[names == name] = np.log(seconds[without] * published)[names == name]
        numbers = [SHARES[best[0]], LAYER_MICROSECONDS[best[1]]] if test == "decode" else [PROMPT_SHARES[best[0]]]
        print(f"{test}: {', '.join(f'{n:.2f}' for n in numbers)}; {len(points)} runs, {len(set(names))} sources")
        groups = np.array([get_group({**p, "test": "decode"}) for p in points])
        for group in ("all", "dense", "mixtures", "hybrids"):
            some = (groups == group) | (group == "all")
            sizes = np.abs(errors[some])
            order = np.argsort(sizes)
            share = weights[some][order].cumsum() / weights[some].sum()
            spread = math.exp(sizes[order][np.searchsorted(share, 0.9)])
            print(
                f"  {group}: {some.sum()} runs left out, median error {np.median(np.exp(sizes) - 1):.2f}, {spread:.2f}"
            )


if __name__ == "__main__":
    main()
