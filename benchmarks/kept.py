"""What each method keeps for the backward pass of the step, beside LoRA: a count, the same on every machine.

    python benchmarks/kept.py [METHOD ...] [--model smollm2-135m] [--json]

Each method stands on the bf16 base with its own defaults (what `slimtune train --method NAME` would take) and runs the
step's forward pass on one row of 128 tokens and on one of 256. What autograd then holds, parameters and buffers apart:

    per token   what a token more takes
    each pass   what a pass takes besides, however long it is: factors in the base's dtype, learned positions
"""

import argparse
import json

from plan import NEEDED

from slimtune import get_peft_model
from slimtune.core.adapters.method_registry import METHODS, get_method_config_class
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.config.method_settings import fill_recipe_defaults
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import compute_step_loss, make_collator
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.planning.memory_tracker import MemoryTracker

SHORT, LONG = 128, 256
VARIANTS = {"lora, DoRA": ("lora", {"use_dora": True}), "lora, dropout": ("lora", {"lora_dropout": 0.1})}


def counted(source: str, name: str) -> dict[str, float]:
    """Attach a method to a base of its own, and count."""
    method, more = VARIANTS.get(name, (name, NEEDED.get(name, {})))
    cls = get_method_config_class(method)
    base = load_base(source, dtype="bfloat16").model
    model = get_peft_model(base, cls(**fill_recipe_defaults(more, cls))).train()
    apply_memory_savings(model)
    short, long = (count_kept_bytes(model, n) for n in (SHORT, LONG))
    each = (long - short) / (LONG - SHORT)
    return {"per_token": each, "each_pass": max(0.0, short - SHORT * each)}


def count_kept_bytes(model, tokens: int) -> int:
    """Return the bytes that exist after the forward pass of a row and did not before."""
    row = [(7 * i * i + 3) % 1000 for i in range(tokens)]
    batch = make_collator(model, 0)([{"input_ids": row, "labels": row}])
    with using_packed_attention(model), MemoryTracker() as tracker:
        tracker.assign([*model.parameters(), *model.buffers()], "model")
        loss = compute_step_loss(model, batch)
    kept = sum(tracker.live.values()) - tracker.live["model"]
    del loss
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.methods or sorted({*METHODS.built_in_names(), *VARIANTS} - {"lora"})
    found = {n: counted(args.model, n) for n in ["lora", *names]}
    for row in found.values():
        row["to_lora"] = round(row["per_token"] / found["lora"]["per_token"], 3)
    if args.json:
        print(json.dumps({"model": args.model, "methods": found}))
        return
    print(f"{'':20}{'to LoRA':>8}{'per token':>12}{'each pass':>12}")
    for name, row in found.items():
        per, each = row["per_token"] / 1e3, row["each_pass"] / 1e6
        print(f"{name:20}{row['to_lora']:8.2f}{per:9.1f} kB{each:9.1f} MB")


if __name__ == "__main__":
    main()
