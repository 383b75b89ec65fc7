"""The serving speed that a plan gives, against published runs and by its formula."""

import statistics

import published_serving as published
import pytest

from slimtune.planning.gpus import find_gpu, gpu_with_memory
from slimtune.planning.serving_speed import DECODING, estimate_serving_speed

LLAMA_8B = {"read_bytes": 4.61e9, "cache_bytes": 0, "weights": 6.98e9, "layers": 32}  # in Q4_K_M


@pytest.mark.slow
def test_published_runs():
    rows = [row for row in published.compare_points() if row["engine"] != "mlx"]
    assert len(rows) >= 200
    median, inside = published.summarize(rows)
    assert median < published.MEDIAN
    assert inside >= published.INSIDE
    assert statistics.median(map(abs, published.left_out_errors(rows))) < published.MEDIAN


def test_every_published_run_has_its_source():
    assert all(
        p["source"] and p["date"] and isinstance(p["seen"], bool) and find_gpu(p["card"]) for p in published.POINTS
    )


def test_formula():
    gpu, fit = find_gpu("rtx-3090"), DECODING["llama.cpp", "nvidia"]
    speed = estimate_serving_speed(gpu, "ollama", **LLAMA_8B)
    seconds = 4.61e9 / (fit.share * 936e9) + 32 * fit.layer_s
    assert speed.decode == pytest.approx([fit.spread.low / seconds, fit.spread.high / seconds])
    assert speed.decode.low < 111.7 < speed.decode.high  # XiongjieDai, May 2024
    assert speed.prefill.low < 3865 < speed.prefill.high


def test_requests_decoded_together_share_the_reading_of_the_weights():
    one, eight, many = (
        estimate_serving_speed(find_gpu("a100-80gb"), "vllm", **LLAMA_8B, sequences=n).decode.low for n in (1, 8, 4000)
    )
    assert one == eight > 8 * many


def test_unknown_hardware_has_no_speed():
    assert estimate_serving_speed(gpu_with_memory("24GiB"), "ollama", **LLAMA_8B) is None
    assert estimate_serving_speed(find_gpu("arc-b580"), "ollama", **LLAMA_8B) is None
