"""Trained tokens a second of one LoRA step: ours beside HF PEFT, on the same rows, in turns, in one process.

    python benchmarks/step.py [--model smollm2-135m] [--rounds 5] [--steps 3] [--json]

Every way trains r = 16 on all linear maps with AdamW on the same 8 rows a step. A round runs each way once, so a
machine that slows down slows all of them; figures are medians over rounds, ratios are taken round by round.

    slimtune        bf16 base, fp32 adapters, rows laid end to end, logits at supervised positions: what `train` runs
    peft tour       HF PEFT as its quick tour sets it up: fp32, padded, dropout 0.1, the model's own loss
    peft bf16       HF PEFT, bf16 base, fp32 adapters, padded, no dropout
    peft best       HF PEFT, bf16 base and adapters, no dropout, rows laid end to end
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch

from slimtune import LoraConfig, get_peft_model
from slimtune.build import step_loss
from slimtune.data.collate import Collator
from slimtune.data.read import read_rows
from slimtune.data.rows import encode_rows
from slimtune.models.load import load_base

ROWS = Path(__file__).parents[1] / "examples/devils-dictionary/train.jsonl"
SETTINGS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BATCH = 8


def full_labels(batch, examples):
    """The same batch as the model's own loss wants it: labels at every position, -100 where nothing is learned."""
    labels = torch.full(batch["input_ids"].shape, -100)
    if labels.shape[0] == 1 and len(examples) > 1:
        flat = [x for e in examples for x in [-100, *e["labels"][1:]]]
        labels[0] = torch.tensor(flat)
    else:
        for i, e in enumerate(examples):
            labels[i, : len(e["labels"])] = torch.tensor(e["labels"])
    return {**{k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}, "labels": labels}


def ours(spec):
    base = load_base(spec, dtype="bfloat16")
    model = get_peft_model(base.model, LoraConfig(**SETTINGS)).train()
    collator = Collator(base.tokenizer.pad_token_id)
    return model, lambda rows: step_loss(model, collator(rows))


def theirs(spec, dtype, dropout, packed, best):
    base = load_base(spec, dtype=dtype)
    config = peft.LoraConfig(**SETTINGS, lora_dropout=dropout)
    model = peft.get_peft_model(base.model, config, autocast_adapter_dtype=not best).train()
    collator = Collator(base.tokenizer.pad_token_id, packing=packed)
    return model, lambda rows: model(**full_labels(collator(rows), rows), use_cache=False).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ways = {
        "slimtune": ours(args.model),
        "peft tour": theirs(args.model, "float32", 0.1, packed=False, best=False),
        "peft bf16": theirs(args.model, "bfloat16", 0.0, packed=False, best=False),
        "peft best": theirs(args.model, "bfloat16", 0.0, packed=True, best=True),
    }
    tokenizer = load_base(args.model).tokenizer
    rows, _ = encode_rows(read_rows(ROWS), tokenizer, max_seq_len=1024, too_long="drop", path=ROWS)
    optimizers = {
        n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-4) for n, (m, _) in ways.items()
    }
    speeds: dict[str, list[float]] = {n: [] for n in ways}
    for turn in range(args.rounds + 1):
        start = turn * args.steps * BATCH
        parts = [rows[start + i * BATCH : start + (i + 1) * BATCH] for i in range(args.steps)]
        tokens = sum(len(e["input_ids"]) for part in parts for e in part)
        for name, (_, loss_of) in ways.items():
            began = time.perf_counter()
            for part in parts:
                loss_of(part).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
            if turn:  # the first round warms up
                speeds[name].append(tokens / (time.perf_counter() - began))
    table = {
        n: {
            "tokens_per_second": round(statistics.median(v), 1),
            "slimtune_is_faster_by": round(
                statistics.median(a / b for a, b in zip(speeds["slimtune"], v, strict=True)), 2
            ),
        }
        for n, v in speeds.items()
    }
    if args.json:
        print(
            json.dumps({"model": args.model, "rounds": args.rounds, "threads": torch.get_num_threads(), "ways": table})
        )
        return
    print(f"{args.model}, {BATCH} rows a step, {args.rounds} × {args.steps} steps, {torch.get_num_threads()} threads")
    for name, row in table.items():
        print(f"{name:12} {row['tokens_per_second']:8.1f} tok/s   slimtune {row['slimtune_is_faster_by']:.2f}×")


if __name__ == "__main__":
    main()
