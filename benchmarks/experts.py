"""LoRA on the experts of a mixture: memory and time of a training step, beside HF PEFT, and with experts in NF4.

    python benchmarks/experts.py                  # 64 experts, 0.3 B parameters, rank 8, 2 rows of 256 tokens
    python benchmarks/experts.py --experts 16 --layers 2 --steps 3

Makes a random Qwen3-MoE in bfloat16 and trains `experts.gate_up_proj` and `experts.down_proj` on the same rows with the
same adapter, each library in a process of its own, in turns. PEFT adds each update to the experts' weights before the
forward pass; slimtune runs it as two thin products on the tokens routed to each expert. "nf4" is slimtune with the
experts in 4 bits, dequantized in each product, in the backward pass again.

    experts  bytes of the experts' weights
    memory   the process's largest RSS in the steps, minus that before the first step (Linux only)
    time     the median of the steps after the first, in processor time
    loss     of the last step: both libraries train the same thing

Exit code 1 if slimtune takes more memory or time than PEFT, or their losses differ by more than 1 %. Without PEFT:
`--only slimtune nf4`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("slimtune", "peft", "nf4")


def read_status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def train(library: str, args: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers as tf

    if library == "peft":
        import peft as home
    else:
        import slimtune as home  # type: ignore[no-redef]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": args.hidden, "moe_intermediate_size": args.hidden // 2, "intermediate_size": args.hidden,
        "num_hidden_layers": args.layers, "num_experts": args.experts, "num_experts_per_tok": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": args.hidden // 8, "vocab_size": 1000,
    }  # fmt: skip
    model: Any = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes)).to(torch.bfloat16)
    if library == "nf4":
        quantize_experts(model)
    experts = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = home.LoraConfig(r=args.rank, lora_alpha=16, target_modules=[], target_parameters=targets)
    torch.manual_seed(1)
    model = home.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = torch.randint(1000, (2, args.tokens), generator=torch.Generator().manual_seed(2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, seconds, loss = read_status("VmRSS"), [], 0.0
    for _ in range(args.steps):
        start = time.process_time()
        out = model(input_ids=rows, labels=rows)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        loss = float(out.loss)
    peak = read_status("VmHWM") - before
    return {"bytes": peak, "seconds": statistics.median(seconds[1:]), "loss": loss, "experts": experts}


def quantize_experts(model: Any) -> None:
    """Hold the stacked experts of a model in NF4, in place."""
    from torch import nn

    from slimtune.extras.nf4_experts import is_expert_parameter, quantize_experts_to_nf4

    for name, weight in list(model.named_parameters()):
        if is_expert_parameter(model, name):
            module, _, leaf = name.rpartition(".")
            packed = nn.Parameter(quantize_experts_to_nf4(weight), requires_grad=False)
            model.get_submodule(module)._parameters[leaf] = packed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 64), ("layers", 3), ("hidden", 1024), ("rank", 8), ("tokens", 256), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each library, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="compare these (default: all)")
    args = parser.parse_args()
    if args.library:
        print(json.dumps(train(args.library, args)))
        return 0
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for library, runs in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--library", library]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    best = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()}
    print(f"{'':10}{'experts':>12}{'memory':>12}{'step':>10}{'loss':>10}")
    for name, values in best.items():
        sizes = "".join(f"{values[key] / 2**20:>8.0f} MiB" for key in ("experts", "bytes"))
        print(f"{name:10}{sizes}{values['seconds']:>8.2f} s{values['loss']:>10.4f}")
    if {"slimtune", "nf4"} <= best.keys():
        smaller, slower = (best[a][key] / best[b][key] for a, b, key in (
            ("slimtune", "nf4", "experts"), ("nf4", "slimtune", "seconds")))  # fmt: skip
        print(f"nf4: experts {smaller:.2f} times smaller, {slower:.2f} of the time of a step in 16 bits")
    if not {"slimtune", "peft"} <= best.keys():
        return 0
    ours, theirs = best["slimtune"], best["peft"]
    memory, seconds = (ours[key] / theirs[key] for key in ("bytes", "seconds"))
    print(f"slimtune takes {memory:.2f} of PEFT's memory and {seconds:.2f} of its time")
    same = abs(ours["loss"] - theirs["loss"]) <= 0.01 * theirs["loss"]
    return 0 if same and memory <= 1 and seconds <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
