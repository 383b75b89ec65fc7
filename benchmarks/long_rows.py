"""How long a row a card can train on: Llama 3.1 8B's shapes, no weight of it, no card.

    python benchmarks/long_rows.py [eight long real]

    eight   LoRA r = 16 on all linear maps, bf16, 4 rows of 2048 tokens, checkpointed: PEFT's step and ours, the same
            counter over fake tensors
    long    LoRA r = 32 on an NF4 base: the longest row that a plan lets on 24 GiB, checkpointed, what is kept sent to
            the machine's memory, norms and feed-forwards in tiles; beside the longest that others published
    real    that last job made small, on real tensors and bitsandbytes' own layers: the counter beside the events of
            torch's allocator

Exit code 1: `eight` takes more than 19 GB, `long` is shorter than 160,000 tokens, `real` is off by 0.5 % or more.
"""

import os
import sys
from dataclasses import replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import peft
import torch
import transformers as tf
from plan_ways.referee import measured

from slimtune import LoraConfig
from slimtune.core.foundation.device import simulating_device_for_kernel_choice
from slimtune.core.models.base_config import load_base_config
from slimtune.planning.fake_tensors import fake_tensor_mode, list_module_tensors, replace_meta_with_fake_cpu_tensors
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.memory_tracker import MemoryTracker
from slimtune.planning.plan_request import MicroBatchWorkload, PlanRequest
from slimtune.planning.planner import estimate_resources

MOST, LONGEST, OFF = 19e9, 160_000, 0.5
TILE = 4096
PUBLISHED = "Unsloth 78,475, Hugging Face with FlashAttention 2 5,789 (unsloth.ai/docs/basics/unsloth-benchmarks)"
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def eight() -> bool:
    """Four rows of 2048 tokens in one pass."""
    rows = (2048,) * 4
    job = MicroBatchWorkload(
        load_base_config("llama-3.1-8b").config, LoraConfig(r=16, **ALL), torch.bfloat16, rows, device="cuda"
    )
    ways = {
        "checkpointed": {},
        "and tiles of 1024": {"mlp_tile_size": 1024},
        "and sent to the machine's memory": {"mlp_tile_size": 1024, "offload_activations": True},
    }
    print("LoRA r = 16 on all linear maps of Llama 3.1 8B, bf16, 4 x 2048 tokens in one pass")
    print(f"  PEFT, checkpointed                        {peers(job) / 1e9:6.2f} GB")
    for name, how in ways.items():
        found = trace_training_step(replace(job, gradient_checkpointing=True, **how))
        beside = f", {found.host_bytes / 1e9:.2f} GB of the machine's" if found.host_bytes else ""
        print(f"  slimtune, {name:32}{found.step / 1e9:6.2f} GB{beside}", flush=True)
    return found.step <= MOST


def peers(job: MicroBatchWorkload) -> int:
    """Return the most bytes that PEFT's step holds: transformers' own loss, fp32 adapters, a fused AdamW."""
    config = peft.LoraConfig(r=16, lora_alpha=16, **ALL)
    with torch.device("meta"):
        model: Any = tf.AutoModelForCausalLM.from_config(job.base_config, dtype=job.dtype)
        model = peft.get_peft_model(model, config)
    with fake_tensor_mode(), simulating_device_for_kernel_choice("cuda"):
        replace_meta_with_fake_cpu_tensors(model)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with MemoryTracker(512) as tracker:
            tracker.assign(list_module_tensors(model), "weights")
            ids = torch.zeros(len(job.lengths), job.lengths[0], dtype=torch.long)
            for _ in range(2):  # the first makes the optimizer's state
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return tracker.peak


def long() -> bool:
    """The longest row on a card of 24 GiB."""
    request = PlanRequest(
        load_base_config("llama-3.1-8b"), require_gpu_by_name("rtx-3090"), LoraConfig(r=32, **ALL), seq_len=LONGEST,
        quantization="nf4", gradient_checkpointing=True, offload_activations=True, mlp_tile_size=TILE,
    )  # fmt: skip
    longest = estimate_resources(request, advise="none").max_seq_len // 10_000 * 10_000
    while (found := estimate_resources(replace(request, seq_len=longest), advise="none")).verdict != "fits":
        longest -= 10_000
    print(f"LoRA r = 32 on Llama 3.1 8B in NF4, one row, 24 GiB, tiles of {TILE}")
    print(f"  longest row     {longest} tokens: {found.verdict}, {found.reason}")
    low, high = (end / 1e9 for end in found.reserved_bytes)
    print(f"  tensors         {found.allocated_bytes / 1e9:.2f} GB, reserved {low:.2f} to {high:.2f} GB")
    print(f"  on the machine  {found.host_bytes / 1e9:.1f} GB of its memory")
    print(f"  published       {PUBLISHED}", flush=True)
    return longest >= LONGEST


def real() -> bool:
    """The same, small enough for this machine."""
    base = tf.LlamaConfig(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=4096, tie_word_embeddings=False,
    )  # fmt: skip
    job = MicroBatchWorkload(
        base,
        LoraConfig(r=32, **ALL),
        torch.bfloat16,
        (8192,),
        gradient_checkpointing=True,
        offload_activations=True,
        mlp_tile_size=1024,
    )
    job = replace(job, quantization="nf4")
    traced, (state, peak) = trace_training_step(job), measured(job)
    held = traced.state_bytes
    error = 100 * (traced.step / peak - 1)
    print("the same made small (6 layers of 512, a row of 8192), real tensors")
    print(f"  state           counted {held}, torch's allocator {state}")
    print(f"  highest point   counted {traced.step}, torch's allocator {peak}: {error:+.3f} %", flush=True)
    return abs(error) < OFF


if __name__ == "__main__":
    tf.logging.set_verbosity_error()
    parts = {"eight": eight, "long": long, "real": real}
    if unknown := set(sys.argv[1:]) - set(parts):
        sys.exit(f"there is no part {min(unknown)!r}: {', '.join(parts)}")
    held = [parts[name]() for name in sys.argv[1:] or parts]
    sys.exit(not all(held))
