"""A training step on a CPU with rows' attention in parts of 128 tokens, beside whole rows.

    python benchmarks/attention_parts.py [--model smollm2-135m] [--rounds 7]

torch's kernel for causal attention on a CPU computes every pair of a row of up to 512 tokens, and half of the pairs are
hidden. slimtune splits a row of up to 2,048 tokens, so that less of that is computed. Both ways alternate in one
process; ratios are taken round by round, after one that warms up, and the median counts.
"""

import argparse
import statistics
from unittest.mock import patch

import torch

from slimtune.core.adapters.peft_model import get_peft_model
from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.core.foundation.device import disable_malloc_trim
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import make_collator
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.core.training.optimizer import build_optimizer
from slimtune.hardware.speed_benchmark import DeviceTimer, run_optimizer_step
from slimtune.methods.lora import LoraConfig

ROWS = ((96,) * 8, (256,) * 4, (512,) * 2, (730,), (1024,), (2048,))
"""Tokens of the rows of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    disable_malloc_trim()
    base = load_base(args.model, device="cpu").model
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    apply_memory_savings(model.train())
    optimizer, collator, clock = build_optimizer(model), make_collator(model, 0), DeviceTimer(torch.device("cpu"))
    print("| rows | whole | in parts | faster by |\n| --- | ---: | ---: | ---: |")
    for lengths in ROWS:
        ids = [torch.randint(1, model.config.vocab_size, (n,)).tolist() for n in lengths]
        rows = [{"input_ids": row, "labels": row} for row in ids]
        times: list[tuple[float, float]] = []
        for _ in range(args.rounds + 1):
            with patch.object(PackedLayout, "split_segments", lambda layout, *_: layout):
                whole = clock.seconds(lambda: run_optimizer_step(model, optimizer, collator, rows))  # noqa: B023
            parts = clock.seconds(lambda: run_optimizer_step(model, optimizer, collator, rows))  # noqa: B023
            times.append((whole, parts))
        whole, parts = (statistics.median(t) for t in zip(*times[1:], strict=True))
        ratio = statistics.median(a / b for a, b in times[1:])
        print(f"| {len(lengths)} of {lengths[0]} tokens | {whole:.3f} s | {parts:.3f} s | {ratio:.3f}× |", flush=True)


if __name__ == "__main__":
    main()
