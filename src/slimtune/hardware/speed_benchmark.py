"""`slimtune bench`: how fast this machine multiplies, moves, trains and decodes.

Every figure is the median of several rounds after a warm-up, and rounds of different sizes alternate, so that a moment
in which something else runs does not decide one size. Training and decoding run real code on random weights of small
Llamas; the factors that turn traced work into seconds are fitted to them (`planning/measured_speeds.py`).
"""

import datetime
import importlib.metadata
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from ..core.adapters.peft_model import get_peft_model
from ..core.attention.attention_functions import using_packed_attention
from ..core.data.collator import Collator, Example
from ..core.data.parallel import exit_with_parent
from ..core.foundation.cpu import read_processor_name
from ..core.foundation.device import disable_malloc_trim
from ..core.foundation.dtype_names import dtype_name, llama_cpp_dtype_name
from ..core.foundation.progress_bars import track_progress
from ..core.foundation.version import __version__
from ..core.models.dtype import pick_device, pick_dtype
from ..core.training.loss import forward_backward, make_collator, move_batch_to_device
from ..core.training.memory_savings import apply_memory_savings
from ..core.training.optimizer import build_optimizer
from ..errors import ModelError, format_install_command
from ..extras.gguf_loading import import_gguf
from ..generation.inference_engines import InProcessLlamaCppEngine, is_xllamacpp_installed
from ..methods.lora import LoraConfig
from ..planning.measured_speeds import (
    LEAST_SPREAD,
    MachineMeasurement,
    MeasuredTrainingStep,
    ServingSpeedFit,
    TrainingSpeedFit,
    compute_step_time_terms,
)
from ..planning.memory_trace import trace_training_step
from ..planning.plan_request import MicroBatchWorkload
from ..planning.this_machine import detect_gpu_or_cpu_spec
from ..planning.weight_formats import MEASURED_GGUF_TYPES

TRAINED = {"cpu": ((512, 4), (1024, 2)), "cuda": ((1024, 4), (2048, 4), (4096, 2)), "mps": ((1024, 4), (2048, 2))}
"""Width and layers of the Llamas that are trained."""
ROWS = {
    "cpu": ((128,), (256,), (96,) * 8, (512, 512), (1024,)),
    "cuda": ((256,), (256,) * 4, (512,) * 8, (2048,) * 2, (4096,)),
    "mps": ((128,), (256,) * 2, (512,) * 2, (1024,)),
}
"""Tokens of the rows of a step. The last two steps have as many tokens, so attention alone tells them apart."""
VOCABULARY = 16384
DECODED = ((2048, 2, 16384), (1024, 6, 8192), (1024, 6, 65536), (512, 32, 16384))
"""Width, layers and vocabulary of the Llamas that write text: unlike enough to tell apart the times of a byte, a layer
and an entry of the vocabulary."""
SHORT_PROMPT, PROMPT, NEW_TOKENS = 16, 256, 32
"""Tokens of the prompts after which text is written, which tell the time of the cache from that of the layers."""
MOST_ROUNDS, LEAST_ROUNDS, SECONDS = 9, 3, 12.0
"""Rounds of a measurement, and after how many seconds there are no more of them."""


@dataclass
class DeviceTimer:
    """Takes times on a device."""

    device: torch.device

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that a call takes, until the device has finished."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def medians(self, works: Sequence[Callable[[], Any]]) -> list[float]:
        """Return the median seconds of each call, in rounds over all of them, there and back."""
        for work in works:
            work()
        times: list[list[float]] = [[] for _ in works]
        start = time.perf_counter()
        for number in range(MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            for index in range(len(works)) if number % 2 == 0 else reversed(range(len(works))):
                times[index].append(self.seconds(works[index]))
        return [statistics.median(t) for t in times]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def measure_machine(device: str = "auto") -> MachineMeasurement:
    """Measure this machine; `device` is as for `pick_device`. It takes two to three minutes and 2 to 3 GB."""
    picked = pick_device(device)
    gpu, dtype, clock = detect_gpu_or_cpu_spec(device), pick_dtype("auto", picked), DeviceTimer(picked)
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}

    def products() -> None:
        found["rates"], found["vector_rates"] = measure_matmul_and_matvec_rates(clock)

    def bandwidth() -> None:
        found["bandwidth"] = _measure_bandwidth(clock)

    def training() -> None:
        found["training"], found["steps"] = measure_training_steps_and_fit_factors(
            clock, dtype, found["rates"], found["bandwidth"]
        )

    def transformers() -> None:
        found["serving"] = {"transformers": _measure_transformers(clock, dtype)}

    def llama_cpp() -> None:
        # A process of its own, as a server is: beside torch's threads, OpenMP lets those of llama.cpp sleep at each
        # barrier, and decoding is a third slower.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exit_with_parent) as process:
            result = process.submit(measure_and_fit_llama_cpp_serving_speed, picked)
        try:
            found["serving"]["llama.cpp"] = result.result()
        except ModelError as error:
            skipped["llama.cpp"] = f"{error.message}{'; ' * bool(error.hint)}{error.hint}"
        except BrokenProcessPool:
            skipped["llama.cpp"] = "its process died, for want of memory or by a fault of the installed xllamacpp"

    for work in track_progress([products, bandwidth, training, transformers, llama_cpp], "measurements"):
        with torch.random.fork_rng(devices=[]):
            work()
    return MachineMeasurement(
        name=gpu.name,
        processor=read_processor_name(),
        threads=torch.get_num_threads() if picked.type == "cpu" else 0,
        date=datetime.date.today().isoformat(),
        versions={"slimtune": __version__, **{n: importlib.metadata.version(n) for n in ("torch", "transformers")}},
        memory=gpu.memory,
        bf16=dtype is torch.bfloat16,
        device=picked.type,
        skipped=skipped,
        **found,
    )


# --- products and memory ----------------------------------------------------------------------------------------------


def measure_matmul_and_matvec_rates(clock: DeviceTimer) -> tuple[dict[str, float], dict[str, float]]:
    """Return by dtype the operations a second of a product with many rows, and the bytes a second of one with one."""
    rates, vectors = {}, {}
    rows, width = (512, 2048) if clock.device.type == "cpu" else (4096, 8192)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = dtype_name(dtype)
        weight = torch.randn(8192, width, device=clock.device).to(dtype)
        many, one = (torch.randn(n, width, device=clock.device).to(dtype) for n in (rows, 1))
        square = weight[:width].contiguous()
        seconds, vector_seconds = clock.medians([lambda: F.linear(many, square), lambda: F.linear(one, weight)])  # noqa: B023
        rates[name] = 2 * many.numel() * len(square) / seconds
        vectors[name] = weight.numel() * weight.element_size() / vector_seconds
    return rates, vectors


def _measure_bandwidth(clock: DeviceTimer) -> float:
    """Return the bytes a second that a copy of 256 MB reads and writes."""
    source = torch.ones(64_000_000, device=clock.device)
    target = torch.empty_like(source)
    (seconds,) = clock.medians([lambda: target.copy_(source)])
    return 2 * source.nbytes / seconds


# --- training ---------------------------------------------------------------------------------------------------------


def make_small_llama_config(width: int, layers: int, vocab_size: int = VOCABULARY) -> LlamaConfig:
    """Return the config of a small Llama."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),  # a CPU's attention takes as long as its queries: four a key is usual
        intermediate_size=3 * width, vocab_size=vocab_size, max_position_embeddings=4096,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def measure_training_steps_and_fit_factors(
    clock: DeviceTimer, dtype: torch.dtype, rates: dict[str, float], bandwidth: float
) -> tuple[TrainingSpeedFit, list[MeasuredTrainingStep]]:
    """Return the factors of a training step's parts, and the steps that they are fitted to."""
    kind: Any = clock.device.type
    if kind == "cpu":
        disable_malloc_trim()  # as in a training run
    works, terms, sizes = [], [], []
    for width, layers in TRAINED[kind]:
        config = make_small_llama_config(width, layers)
        method = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).to(clock.device)
        model: Any = get_peft_model(base, method)
        apply_memory_savings(model.train())
        optimizer, collator = build_optimizer(model), make_collator(model, 0)
        for lengths in ROWS[kind]:
            trace = trace_training_step(MicroBatchWorkload(config, method, dtype, lengths, device=kind))
            moved = 2 * trace.state_bytes_by_part["optimizer"] + 3 * trace.state_bytes_by_part["adapters"]
            terms.append(
                compute_step_time_terms(
                    trace.counts_by_operator_cost, trace.attention_flops_by_dtype, moved, rates, bandwidth
                )
            )
            ids = [torch.randint(1, VOCABULARY, (n,)).tolist() for n in lengths]
            rows = [{"input_ids": row, "labels": row} for row in ids]
            works.append(partial(run_optimizer_step, model, optimizer, collator, rows))
            sizes.append((width, layers, list(lengths)))
    seconds = clock.medians(works)
    factors = fit_nonnegative_factors(terms, seconds)
    steps = [
        MeasuredTrainingStep(
            *size, seconds=measured, fitted_seconds=sum(f * t for f, t in zip(factors, own, strict=True))
        )
        for size, measured, own in zip(sizes, seconds, terms, strict=True)
    ]
    spread = _widen_spread([step.fitted_seconds / step.seconds for step in steps])
    arithmetic, traffic, attention, overhead = factors
    return TrainingSpeedFit(arithmetic, traffic, attention, overhead, spread), steps


def run_optimizer_step(model: Any, optimizer: torch.optim.Optimizer, collator: Collator, rows: list[Example]) -> None:
    """Take one optimizer step on rows."""
    batch = move_batch_to_device(collator(rows), model.device)
    with using_packed_attention(model):
        forward_backward(model, [batch])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    model.zero_grad()


# --- decoding ---------------------------------------------------------------------------------------------------------


def _measure_transformers(clock: DeviceTimer, dtype: torch.dtype) -> ServingSpeedFit:
    """Return how fast `generate` of transformers decodes and reads a prompt."""
    name = llama_cpp_dtype_name(dtype).upper()
    works, runs, operations = [], [], []
    for shape in DECODED:
        config = make_small_llama_config(*shape)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).to(clock.device).eval()
        model.generation_config.eos_token_id = None

        def generate(length: int, new: int, model: Any = model) -> None:
            prompt = torch.ones(1, length, dtype=torch.long, device=clock.device)
            model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)

        embedding = model.get_input_embeddings().weight
        read = sum(p.nbytes for p in model.parameters() if p is not embedding)
        for length in (PROMPT, SHORT_PROMPT):
            works += [partial(generate, length, 1), partial(generate, length, 1 + NEW_TOKENS)]
            runs.append((name, float(read), config, _cached_bytes(config, length, embedding.element_size())))
        operations.append(2.0 * PROMPT * (read / embedding.element_size() - embedding.numel()))
    with torch.no_grad():
        seconds = clock.medians(works)
    prompts, wholes = seconds[::2], seconds[1::2]
    decoded = [(whole - first) / NEW_TOKENS for first, whole in zip(prompts, wholes, strict=True)]
    return fit_decode_token_seconds([name], runs, decoded, {name: operations[0] / prompts[0]})


def measure_and_fit_llama_cpp_serving_speed(device: torch.device) -> ServingSpeedFit:
    """Return how fast llama.cpp decodes and reads a prompt, for each of `MEASURED_GGUF_TYPES`.

    Raises:
        ModelError: xllamacpp or gguf is not installed, or they compute on another device.
    """
    if not is_xllamacpp_installed():
        raise ModelError("the package xllamacpp is not installed", "llama.cpp", format_install_command("export-check"))
    import xllamacpp

    has_gpu = any("GPU" in str(d.get("type", "")) for d in xllamacpp.get_device_info())
    if device.type != "cpu" and not has_gpu:
        raise ModelError("the installed xllamacpp computes on the CPU alone", "a build for this GPU")
    runs, decoded = [], []
    prompts: dict[str, list[float]] = {precision: [] for precision in MEASURED_GGUF_TYPES}
    with tempfile.TemporaryDirectory(prefix="slimtune-bench-") as folder:
        # Twice: the speed of a machine changes within a minute, and must not decide one shape.
        for precision, shape in 2 * list(itertools.product(MEASURED_GGUF_TYPES, DECODED)):
            file = Path(folder) / "model.gguf"
            config = make_small_llama_config(*shape)
            read_bytes, weights = _write_random_gguf(file, config, precision)
            with file.open("rb") as written:
                os.fsync(written.fileno())  # else the system writes it to the disk meanwhile, and halves the speed
            engine = InProcessLlamaCppEngine(
                file, max_tokens=2 * PROMPT, threads=max(torch.get_num_threads(), 1), cache="f16",
                gpu_layers=0 if device.type == "cpu" else 999,
            )  # fmt: skip
            for length in (PROMPT, SHORT_PROMPT):
                engine.measure_seconds(length, NEW_TOKENS)
                rounds = [engine.measure_seconds(length, NEW_TOKENS) for _ in range(2)]
                prompt_s, token_s = (statistics.median(times) for times in zip(*rounds, strict=True))
                runs.append((precision, float(read_bytes), config, _cached_bytes(config, length, 2)))
                decoded.append(token_s)
                if (shape, length) == (DECODED[0], PROMPT):
                    prompts[precision].append(2 * weights / prompt_s)
            engine.close()
            file.unlink()
    return fit_decode_token_seconds(
        MEASURED_GGUF_TYPES, runs, decoded, {p: statistics.median(speeds) for p, speeds in prompts.items()}
    )


def _cached_bytes(config: LlamaConfig, prompt: int, bytes_per_value: int) -> float:
    """Return the bytes of keys and values that a new token reads on average after a prompt."""
    heads = config.num_key_value_heads or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    return float(per_token * bytes_per_value * (prompt + NEW_TOKENS / 2))


def fit_decode_token_seconds(
    precisions: Sequence[str],
    measured_runs: Sequence[tuple[str, float, LlamaConfig, float]],
    token_seconds: Sequence[float],
    reported_prompt_flops_by_precision: dict[str, float],
) -> ServingSpeedFit:
    """Fit the seconds of a token to runs of (precision, bytes, config, cached bytes)."""
    features = [
        [
            *(n * (precision == p) for n in (size, config.num_hidden_layers) for p in precisions),
            cached,
            config.vocab_size,
            1.0,
        ]
        for precision, size, config, cached in measured_runs
    ]
    *by_precision, cached_byte_s, logit_s, token_s = factors = fit_nonnegative_factors(features, token_seconds)
    inverse, layers = by_precision[: len(precisions)], by_precision[len(precisions) :]
    fitted = [sum(f * x for f, x in zip(factors, row, strict=True)) for row in features]
    speeds = {p: 1 / i for p, i in zip(precisions, inverse, strict=True) if i > 0}
    spread = _widen_spread([f / s for f, s in zip(fitted, token_seconds, strict=True)])
    layer_s = dict(zip(precisions, layers, strict=True))
    return ServingSpeedFit(speeds, cached_byte_s, layer_s, logit_s, token_s, reported_prompt_flops_by_precision, spread)


def _write_random_gguf(file: Path, config: LlamaConfig, precision: str) -> tuple[int, int]:
    """Write a Llama whose weights are 0; return the bytes and the weights in matrices that a token takes.

    Raises:
        ModelError: the package gguf is not installed.
    """
    gguf = import_gguf()
    kinds = gguf.GGMLQuantizationType
    usual, larger = (kinds.Q4_K, kinds.Q6_K) if precision == "Q4_K_M" else (kinds[precision],) * 2
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = width // config.num_attention_heads * (config.num_key_value_heads or 1)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width // config.num_attention_heads)
    writer.add_tokenizer_model("llama")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *(f"t{i}" for i in range(vocabulary - 259))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocabulary - 259)])
    read = weights = 0

    def add(name: str, rows: int, columns: int, kind: Any, counts: bool = True) -> None:
        nonlocal read, weights
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((rows, columns // block * size), dtype=np.uint8)
        if kind == kinds.F16:
            data = data.view(np.float16)
        writer.add_tensor(name, data, raw_dtype=kind)
        read += data.nbytes * counts
        weights += rows * columns * name.startswith("blk")

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    add("token_embd.weight", vocabulary, width, usual, counts=False)
    add("output.weight", vocabulary, width, larger)
    add_norm("output_norm.weight")
    for layer in range(config.num_hidden_layers):
        # llama.cpp gives more bits to these two matrices in half of the layers.
        value_down = larger if layer % 2 == 0 else usual
        for name, rows, columns, kind in (
            ("attn_q", width, width, usual), ("attn_k", keys, width, usual), ("attn_v", keys, width, value_down),
            ("attn_output", width, width, usual), ("ffn_gate", inner, width, usual), ("ffn_up", inner, width, usual),
            ("ffn_down", width, inner, value_down),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", rows, columns, kind)
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read, weights


# --- fits -------------------------------------------------------------------------------------------------------------


def fit_nonnegative_factors(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the factors, none below 0, whose sum of features is nearest to the seconds, by relative error."""
    matrix = np.array(features) / np.array(seconds)[:, None]
    ones, best, least = np.ones(len(seconds)), np.zeros(matrix.shape[1]), np.inf
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    for count in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), count):
            part = (matrix / scale)[:, chosen]
            solution = np.linalg.lstsq(part, ones, rcond=None)[0]
            error = float(((part @ solution - ones) ** 2).sum())
            if (solution >= 0).all() and error < least - 1e-12:
                least, best = error, np.zeros(matrix.shape[1])
                best[list(chosen)] = solution
    return [float(x) for x in best / scale]


def _widen_spread(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the range 1 / x to x that has all ratios of measured speed to the formula's, x at least 1.1."""
    widest = max(1 + LEAST_SPREAD, *(max(r, 1 / r) for r in ratios))
    return 1 / widest, widest
