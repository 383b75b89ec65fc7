"""Measuring this machine: the fits, the stored file, and the predictions that follow from it."""

import csv
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from hand_measurement import FOUND
from transformers import LlamaConfig

from slimtune.errors import RunError, UsageError
from slimtune.hardware import speed_benchmark as bench
from slimtune.planning import measured_speeds as store
from slimtune.planning.gpu_specs import load_this_machine_measured_gpu, require_gpu_by_name
from slimtune.planning.measured_speeds import load_machine_measurement, overwrite_machine_measurement
from slimtune.planning.plan_result import TrainingWorkload
from slimtune.planning.serving_speed import estimate_decode_and_prefill_speed
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec
from slimtune.planning.throughput import estimate_training_speed

BF16 = torch.bfloat16


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A stored measurement of this machine."""
    monkeypatch.setenv("SLIMTUNE_BENCH", str(tmp_path / "data" / "bench.json"))
    monkeypatch.setattr(store, "read_processor_name", lambda: "a CPU")
    return overwrite_machine_measurement(FOUND)


def test_fit_finds_the_factors_and_none_below_zero():
    features = [(1.0, 2.0, 3.0), (2.0, 1.0, 5.0), (4.0, 4.0, 1.0), (1.0, 7.0, 2.0)]
    seconds = [2 * a + 0.5 * b for a, b, _ in features]
    assert bench.fit_nonnegative_factors(features, seconds) == pytest.approx([2, 0.5, 0], abs=1e-9)
    assert min(bench.fit_nonnegative_factors([(1, 1), (2, 1)], [1.0, 3.0])) == 0  # 2·a − b would be exact


def test_fit_of_decoding():
    speeds, layer_s = {"F16": 1e10, "Q8_0": 8e9}, {"F16": 1e-4, "Q8_0": 3e-4}
    shapes = [(1e8, 2, 9000, 1e5), (1e8, 2, 300, 1e6), (4e7, 12, 5000, 5e5), (2e7, 30, 300, 1e6), (2e7, 30, 800, 9e6)]
    runs, seconds = [], []
    for (precision, speed), (size, layers, vocab_size, cached) in itertools.product(speeds.items(), shapes):
        runs.append((precision, size, LlamaConfig(num_hidden_layers=layers, vocab_size=vocab_size), cached))
        seconds.append(size / speed + cached / 3e9 + layers * layer_s[precision] + vocab_size * 1e-8 + 2e-3)
    fit = bench.fit_decode_token_seconds(("F16", "Q8_0"), runs, seconds, {})
    assert fit.bytes_per_second == pytest.approx(speeds)
    assert fit.layer_s == pytest.approx(layer_s)
    assert (fit.logit_s, fit.token_s, 1 / fit.cached_byte_s) == pytest.approx((1e-8, 2e-3, 3e9))
    assert fit.spread == (1 / 1.1, 1.1)


def test_median_is_of_alternating_rounds():
    called = []
    bench.DeviceTimer(torch.device("cpu")).medians([lambda: called.append("a"), lambda: called.append("b")])
    assert "".join(called[:6]) == "ababba"


def test_stored_measurement_comes_back(stored):
    assert load_machine_measurement() == FOUND
    assert load_this_machine_measured_gpu().measured == FOUND == require_gpu_by_name("This Machine").measured
    assert detect_gpu_or_cpu_spec("cpu").measured == FOUND


def test_measurement_of_another_processor_or_thread_count_is_not_used(stored, monkeypatch):
    overwrite_machine_measurement(replace(FOUND, threads=FOUND.threads + 1))
    assert detect_gpu_or_cpu_spec("cpu").measured is None
    monkeypatch.setattr(store, "read_processor_name", lambda: "another CPU")
    assert load_machine_measurement() is None
    with pytest.raises(UsageError, match="this machine"):
        require_gpu_by_name("this machine")


@pytest.mark.parametrize("change", [{"training": 3}, {"bandwidth": -1}, {"more": 1}, {"serving": {"x": {}}}])
def test_damaged_measurement_is_an_error(stored, change):
    stored.write_text(json.dumps(json.loads(stored.read_text()) | change))
    with pytest.raises(RunError, match=str(stored)):
        load_machine_measurement()


def test_training_speed_follows_the_fit(stored):
    work = Counter({(4e9, 100, BF16): 10, (0, 2e6, BF16): 100})
    seconds = 1.5 * 10 * 4e9 / 4e11 + 0.5 * 100 * 2e6 / 2e10 + 10 * 1e-5
    speed = estimate_training_speed(TrainingWorkload(work, {}, 1000), load_this_machine_measured_gpu())
    assert (*speed,) == pytest.approx([0.9 * 1000 / seconds, 1.1 * 1000 / seconds])
    seconds += 2.0 * 3e10 / 1e11
    slower = estimate_training_speed(
        TrainingWorkload(work, {torch.float32: 3e10}, 1000), load_this_machine_measured_gpu()
    )
    assert (*slower,) == pytest.approx([0.9 * 1000 / seconds, 1.1 * 1000 / seconds])


def test_serving_speed_follows_the_fit(stored):
    weights = {"weight_bytes_per_token": 1e8, "kv_bytes_per_request": 1e7, "matmul_weight_count": 1e8}
    job = {**weights, "layers": 10, "vocab_size": 50000}
    speed = estimate_decode_and_prefill_speed(load_this_machine_measured_gpu(), "ollama", **job)
    assert speed.decode.high == pytest.approx(1.1 / (1.1e8 / 1e10 + 1e-3 + 5e-4))
    assert speed.prefill.low == pytest.approx(0.9 * 1e11 / 2e8)
    assert speed.evidence.endswith(" 2026-11-26")
    near = estimate_decode_and_prefill_speed(load_this_machine_measured_gpu(), "llama.cpp", **job, precision="Q5_K_M")
    assert (near.decode, near.evidence) == (speed.decode, f"{speed.evidence}, in Q4_K_M")
    other = estimate_decode_and_prefill_speed(load_this_machine_measured_gpu(), "vllm", **job, precision="bf16")
    assert other.evidence == "guessed"


@pytest.mark.slow
def test_real_steps_and_random_files(monkeypatch):
    monkeypatch.setattr(bench, "TRAINED", {"cpu": ((128, 1), (256, 2))})
    monkeypatch.setattr(bench, "ROWS", {"cpu": ((8,), (16, 16))})
    monkeypatch.setattr(bench, "MOST_ROUNDS", 3)
    fit, steps = bench.measure_training_steps_and_fit_factors(
        bench.DeviceTimer(torch.device("cpu")), BF16, FOUND.rates, FOUND.bandwidth
    )
    assert len(steps) == 4
    assert max(fit.arithmetic, fit.traffic, fit.attention, fit.overhead) > 0
    monkeypatch.setattr(bench, "DECODED", ((256, 1, 300), (256, 2, 900), (512, 1, 300)))
    serving = bench.measure_and_fit_llama_cpp_serving_speed(torch.device("cpu"))
    assert set(serving.prompt_flops) == set(bench.MEASURED_GGUF_TYPES)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_stores_shows_and_exports(stored, slimtune, monkeypatch):
    os.remove(stored)
    assert slimtune("bench", "--show").exit_code == 2
    monkeypatch.setattr(bench, "measure_machine", lambda device: FOUND)
    done = slimtune("bench")
    assert (done.exit_code, stored.is_file()) == (0, True), done.output
    assert slimtune("bench", "--show").stdout == done.stdout
    heading, row = csv.reader(slimtune("bench", "--export").stdout.splitlines())
    with (files("slimtune.planning") / "gpus.csv").open(encoding="utf-8") as table:
        assert heading == next(csv.reader(table))
    assert dict(zip(heading, row, strict=True))["bf16_tflops"] == "0.4"


@pytest.mark.slow
def test_plan_says_that_the_speed_was_measured_here(stored, slimtune):
    done = slimtune("plan", "smollm2-135m", "--max-seq-len", "64", "--device", "cpu", "--dtype", "bf16")
    assert re.search(r"tokens/s, .*2026-11-26", done.stdout), done.output
    os.remove(stored)
    done = slimtune("plan", "smollm2-135m", "--max-seq-len", "64", "--device", "cpu", "--dtype", "bf16")
    assert "slimtune bench" in done.stdout, done.output
