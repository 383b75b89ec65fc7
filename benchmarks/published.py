"""Traced memory of published training runs against what others measured on a GPU.

    python benchmarks/published.py [allocated reserved ours] [--json FILE]

    allocated   13 runs of vramcalc on an RTX A6000 (Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen 2.5 1.5B), scored
    reserved    12 runs of PEFT's MetaMathQA comparison on an L40S (Llama 3.2 3B, a method each), scored
    ours        runs of litgpt, torchtune and Unsloth, whose steps differ, beside our own step for the same job

The figures are in data/memory_points.json. Of the first two the engine is published to the last line, so the peer's own
step (transformers and PEFT, as installed here) runs on fake tensors under the tracer in that engine's order. Nothing is
fitted to a row. Three facts come from elsewhere:

    cuBLAS      holds a workspace for each thread that multiplies matrices: one forward and one backward
    masks       transformers 4.57, vramcalc's, builds a mask for rows that need none; MetaMathQA's rows are padded
    lengths     the length of MetaMathQA's longest batch is not published. One run that is not scored (marked in the
                data) reserved what 696 tokens take, and all runs had the same rows: so 696 is used for the others

A reserved figure counts as inside if it is in the range that a plan gives the longest training step
(`estimate_total_reserved_memory`). It is the peak of a whole run: prefix tuning's was in its evaluation, where 50 rows
of 200 learned keys grow by 300 tokens.

Exit code 1: a mean error of allocated bytes of 1 % or more, a worst of 3 % or more, or less than 90 % of the reserved
figures inside.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers as tf
from transformers import masking_utils

import slimtune
from slimtune.core.adapters.method_registry import get_method_config_class
from slimtune.core.foundation.device import simulating_device_for_kernel_choice
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.base_config import load_base_config
from slimtune.errors import UsageError
from slimtune.planning.extrapolation import extrapolate_step_trace
from slimtune.planning.fake_tensors import fake_tensor_mode, list_module_tensors, replace_meta_with_fake_cpu_tensors
from slimtune.planning.interval import Interval
from slimtune.planning.memory_tracker import MemoryTracker
from slimtune.planning.plan_request import MicroBatchWorkload
from slimtune.planning.planner import (
    CUBLAS_WORKSPACES,
    estimate_peak_allocated_and_reserved,
    estimate_total_reserved_memory,
)

POINTS = Path(__file__).parent / "data" / "memory_points.json"
MEAN, WORST, INSIDE = 1.0, 3.0, 90.0
"""Errors of allocated bytes that are too large, and the least share of reserved ones inside the band, in per cent."""


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make new tensors fake ones on a CUDA device; attention has a mask, and no module is dropped at random."""
    masked = mock.patch.object(masking_utils, "is_tracing", return_value=True)
    # LoKr draws random numbers even if it drops nothing.
    drawn = mock.patch.object(torch, "rand", side_effect=lambda *_, **__: torch.tensor([0.5]))
    with fake_tensor_mode(), simulating_device_for_kernel_choice("cuda"), masked, drawn:
        yield


def model_tensors(model: Any) -> list[torch.Tensor]:
    """Return a model's tensors in the order they are made: the base before its adapter."""
    return [*(p for p in model.parameters() if not p.requires_grad), *list_module_tensors(model)]


# -- vramcalc: bench.py of the wheel ---------------------------------------------------------------------------------

BASES = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "8b": "llama-3.1-8b", "1.5b": "qwen2.5-1.5b"}


def vramcalc(row: dict[str, Any]) -> int:
    """Return the peak of allocated bytes in the second step, after a first one and an emptied cache."""
    words = row["method"].split()
    amp, attention = "amp" in words, "eager" if "eager" in words else "sdpa"
    dtype = torch.float32 if amp else torch.bfloat16
    # Of what a Llama runs, both lists of autocast, CPU's and CUDA's, send the same operators to bf16 (products and
    # attention), and what only CUDA's keeps in fp32 (powers, roots, softmax) meets nothing else in this model.
    autocast: Callable[[], Any] = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if amp else nullcontext
    with torch.device("meta"):
        base = load_base_config(BASES[words[0]]).config
        model: Any = tf.AutoModelForCausalLM.from_config(base, dtype=dtype, attn_implementation=attention)
        if "lora" in words:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, config)
    with fake_cuda():
        replace_meta_with_fake_cpu_tensors(model)
        model.train()
        model.config.use_cache = False
        if "ckpt" in words:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        with MemoryTracker(512) as tracker:
            tracker.assign(model_tensors(model), "weights")
            ids = torch.zeros(row["batch"], row["max_seq"], dtype=torch.long)

            for phase in ("first step", "second step"):
                tracker.start_phase(phase)
                with autocast():
                    out = model(input_ids=ids, labels=ids, use_cache=False)
                    loss = out.loss
                loss.backward()
                del out, loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    return sum(tracker.phases["second step"].values()) + CUBLAS_WORKSPACES


# -- PEFT: method_comparison/MetaMathQA, run.py and experiments/*/adapter_config.json ---------------------------------

_PROMPT: dict[str, Any] = {
    "num_virtual_tokens": 200, "token_dim": 3072, "num_layers": 28, "num_attention_heads": 24,
    "num_transformer_submodules": 1, "task_type": "CAUSAL_LM",
}  # fmt: skip
_LORA: dict[str, Any] = {"task_type": "CAUSAL_LM"}
EXPERIMENTS: dict[str, Callable[[], Any] | None] = {
    "full-finetuning/llama-3.2-3B-lr_0.00001": None,
    "ia3/llama-3.2-3B-default": lambda: peft.IA3Config(),
    "ln_tuning/llama-3.2-3B-default": lambda: peft.LNTuningConfig(),
    "lokr/llama-3.2-3B-rank32-factor4-lr0.003": lambda: peft.LoKrConfig(
        r=32, alpha=64, decompose_factor=4, target_modules=["q_proj", "v_proj"]
    ),
    "lora/llama-3.2-3B-rank32-dora": lambda: peft.LoraConfig(r=32, lora_alpha=64, use_dora=True, **_LORA),
    "lora/llama-3.2-3B-rank32-mica": lambda: peft.LoraConfig(r=32, lora_alpha=64, init_lora_weights="mica", **_LORA),
    "lora/llama-3.2-3B-rank64": lambda: peft.LoraConfig(r=64, lora_alpha=128, **_LORA),
    "miss/llama-3.2-3B-default": lambda: peft.MissConfig(r=64, mini_r=1),
    "prefixtuning/llama-3.2-3B-lr_0.001": lambda: peft.PrefixTuningConfig(**_PROMPT),
    "prompt_tuning/llama-3.2-3B-default": lambda: peft.PromptTuningConfig(**_PROMPT),
    "randlora/llama-3.2-3B-default": lambda: peft.RandLoraConfig(r=32, randlora_alpha=640),
    "tinylora/llama-3.2-3B-default": lambda: peft.TinyLoraConfig(r=2, u=64, target_modules=["q_proj", "v_proj"]),
    "vera/llama-3.2-3B-default": lambda: peft.VeraConfig(r=256),
}
LONGEST, SHORT = 696, 100
"""Tokens of the longest batch, and of the one before it: each group of 20 batches begins with its longest."""


def metamath(row: dict[str, Any], longest: int = LONGEST) -> Interval:
    """Return the range that a plan would give for the bytes reserved for the longest batch."""
    make = EXPERIMENTS[row["method"]]
    with torch.device("meta"):
        config = load_base_config(row["model"]).config
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if make is not None:
            model = peft.get_peft_model(model, make())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained != row["trainable"]:
        raise UsageError(f"{row['method']} trains {trained} parameters here", f"{row['trainable']}, as published")
    with fake_cuda():
        replace_meta_with_fake_cpu_tensors(model)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # its default on CUDA
        with MemoryTracker(512) as tracker:
            tracker.assign(model_tensors(model), "weights")
            outputs = loss = batch = None
            # run.py's variables keep the tensors of a step until the next step replaces them.
            for length in (SHORT, longest):
                batch = {k: torch.ones(row["batch"], length, dtype=torch.long) for k in ("input_ids", "attention_mask")}
                batch["labels"] = batch["input_ids"].clone()
                optimizer.zero_grad()
                outputs = model(**batch, num_items_in_batch=row["batch"] * length)
                loss = outputs.loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                optimizer.step()
            tracker.assign((t for s in optimizer.state.values() for t in s.values()), "optimizer")
            state = tracker.live["weights"] + tracker.live["optimizer"]
    return estimate_total_reserved_memory("cuda", tracker.peak + CUBLAS_WORKSPACES, state)


# -- Others' engines, beside our own step ----------------------------------------------------------------------------

NAMES = {
    "llama-3-8b": "llama-3.1-8b", "mistral-7b": "mistral-7b-v0.1", "mistral-7b-v0.2": "mistral-7b-v0.3",
    "tiny-llama": "tinyllama-1.1b", "phi-3-mini-4k-instruct": "phi-3-mini-4k",
}  # fmt: skip
"""Shipped facts of the same shape under another name (Mistral 0.3 has 768 rows of the embedding more than 0.2)."""


def job_of(row: dict[str, Any]) -> MicroBatchWorkload | None:
    """Return our job for a row of another engine; None if we have no such job, or the base is unknown."""
    name, source, method = row["model"].lower(), row["source"], row["method"]
    try:
        base = load_base_config(NAMES.get(name, name)).config
    except UsageError:
        return None
    rank, quantization, passes = 32, None, 1
    targets: str | list[str] = "all-linear"
    lengths = (row.get("max_seq") or row.get("max_context_at_vram"),) * row.get("batch", 1)
    if "litgpt" in source:
        rank, passes = (8, 1) if row.get("trainable") else (32, 2)  # its older tables; its recipes
        targets = ["qkv_proj"] if name.startswith("phi-3") else ["q_proj", "v_proj"]
        kinds = {None: None, "nf4": "nf4-single", "nf4-dq": "nf4"}
        quantization = "nf4-single" if "qlora" in method else kinds[row.get("quantization")]
    elif "unsloth" in source and lengths[0]:  # the length that filled a card with Hugging Face and flash attention 2
        quantization = "nf4"
    elif "torchtune" not in source or method not in ("full", "full +chunked CE", "full +activation checkpointing"):
        return None
    lora = slimtune.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    return MicroBatchWorkload(
        base, get_method_config_class("full")() if "full" in method else lora, torch.bfloat16, lengths, passes, "cuda",
        gradient_checkpointing="checkpointing" in method or "unsloth" in source, quantization=quantization,
    )  # fmt: skip


# -- Tables ----------------------------------------------------------------------------------------------------------


def allocated_table(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    print("\n| run | published GB | traced GB | error % |\n| --- | ---: | ---: | ---: |")
    found = []
    for row in rows:
        if not row["source"].startswith("vramcalc"):
            continue
        published, traced = row["peak_GB"] * 1e9, vramcalc(row)
        error = 100 * (traced / published - 1)
        found.append({"run": row["method"], "published": published, "traced": traced, "error_percent": error})
        print(f"| {row['method']} | {published / 1e9:.2f} | {traced / 1e9:.3f} | {error:+.2f} |", flush=True)
    errors = [abs(r["error_percent"]) for r in found]
    mean, worst = sum(errors) / len(errors), max(errors)
    print(f"\nAllocated, {len(errors)} runs: mean error {mean:.3f} %, worst {worst:.3f} %.")
    return found, mean < MEAN and worst < WORST


def reserved_table(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    print("\n| run | published GB | range GB | inside |")
    print("| --- | ---: | ---: | --- |")
    found = []
    for row in rows:
        if "MetaMathQA" not in row["source"]:
            continue
        published = row["peak_bytes_reserved_max"]
        band = metamath(row)
        inside, counts = band.low <= published <= band.high, not row.get("calibrates")
        found.append({
            "run": row["method"], "published": published, "band": to_json_dict(band), "inside": inside,
            "scored": counts,
        })  # fmt: skip
        said = ("no", "yes")[inside] if counts else "not scored"
        low, high = (f"{end / 1e9:.2f}" for end in band)
        print(f"| {row['method']} | {published / 1e9:.3f} | {low} to {high} | {said} |", flush=True)
    scored = [r for r in found if r["scored"]]
    share = 100 * sum(r["inside"] for r in scored) / len(scored)
    print(f"\nReserved, {len(scored)} runs: {share:.0f} % inside the band.")
    return found, share >= INSIDE


def ours_table(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    print("\n| engine | run | batch × length | published GB | our step GB |\n| --- | --- | --- | ---: | ---: |")
    found = []
    for row in rows:
        job = job_of(row)
        if job is None:
            continue
        engine = next(e for e in ("litgpt", "torchtune", "unsloth") if e in row["source"])
        published = (row["peak_GB"] if "peak_GB" in row else row["vram_GB"]) * 1e9
        peak, _ = estimate_peak_allocated_and_reserved(job, extrapolate_step_trace(job))
        found.append({"engine": engine, "run": row["method"], "published": published, "ours": peak})
        shape = f"{len(job.lengths)} × {job.lengths[0]}"
        name = row["method"] if row["model"].lower() in row["method"] else f"{row['model']} {row['method']}"
        quantization = f", {row['quantization']}" if row.get("quantization") else ""
        print(f"| {engine} | {name}{quantization} | {shape} | {published / 1e9:.2f} | {peak / 1e9:.2f} |", flush=True)
    return found, True


TABLES = {"allocated": allocated_table, "reserved": reserved_table, "ours": ours_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"which of {', '.join(TABLES)}; all, if none is named"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"there is no table {min(unknown)!r}: {', '.join(TABLES)}")
    tf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = json.loads(POINTS.read_text(encoding="utf-8"))
    done = {name: TABLES[name](rows) for name in args.tables or TABLES}
    if args.json:
        versions = {"torch": torch.__version__, "transformers": tf.__version__, "peft": peft.__version__}
        args.json.write_text(json.dumps(versions | {k: found for k, (found, _) in done.items()}, indent=2) + "\n")
    sys.exit(not all(held for _, held in done.values()))


if __name__ == "__main__":
    main()
