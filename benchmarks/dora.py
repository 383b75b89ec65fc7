"""A DoRA step against a LoRA step, ours and HF PEFT's: time and peak memory, in turns, in one process.

    python benchmarks/dora.py [--model smollm2-135m | --random LAYERS] [--rounds 7] [--tokens 512] [--json]

Every way trains r = 16 on all linear maps of the same bf16 base with fp32 adapters: forward, loss, backward, AdamW. A
round runs each way once, so a machine that slows down slows all of them; times are medians over rounds, ratios are
taken round by round. Peak memory is the most bytes that live tensors held at once during a step, beyond what lay there
before it (base, adapter, optimizer), counted by a dispatch mode: it is exact and the same on every machine.
`--random LAYERS` takes a random Llama of SmolLM2-135M's widths, which needs no download.
"""

import argparse
import copy
import json
import statistics
import time
import weakref

import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import slimtune

SETTINGS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WIDTHS = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen and key not in given:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def base_of(args):
    if args.random is not None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**WIDTHS, num_hidden_layers=args.random)
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    from slimtune.core.models.loader import load_base

    return load_base(args.model, dtype="bfloat16").model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random", type=int, default=None, metavar="LAYERS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = base_of(args)
    steps = {}
    for home in (slimtune, peft):
        for dora in (False, True):
            config = home.LoraConfig(**SETTINGS, use_dora=dora)
            model = home.get_peft_model(copy.deepcopy(base), config).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
            steps[f"{home.__name__} {'dora' if dora else 'lora'}"] = (model, optimizer)
    ids = torch.randint(0, base.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))

    def step(name: str) -> None:
        model, optimizer = steps[name]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peaks, times = {}, {n: [] for n in steps}
    for name in steps:
        step(name)  # makes the optimizer's state
        with LiveBytes() as live:
            step(name)
        peaks[name] = live.peak
    for _ in range(args.rounds):
        for name in steps:
            began = time.perf_counter()
            step(name)
            times[name].append(time.perf_counter() - began)
    table = {}
    for name in steps:
        lora = f"{name.split()[0]} lora"
        table[name] = {
            "seconds": round(statistics.median(times[name]), 4),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "time_over_lora": round(statistics.median(a / b for a, b in zip(times[name], times[lora], strict=True)), 3),
            "memory_over_lora": round(peaks[name] / peaks[lora], 3),
        }
    size = args.model if args.random is None else f"a random Llama of {args.random} layers"
    if args.json:
        print(json.dumps({"model": size, "tokens": args.tokens, "threads": torch.get_num_threads(), "ways": table}))
        return
    print(f"{size}, {args.tokens} tokens, {args.rounds} rounds, {torch.get_num_threads()} threads")
    for name, row in table.items():
        print(
            f"{name:14} {row['seconds']:8.3f} s {row['peak_mib']:9.1f} MiB   "
            f"{row['time_over_lora']:.2f}× the time, {row['memory_over_lora']:.2f}× the memory of lora"
        )


if __name__ == "__main__":
    main()
