"""Many adapters on one model: what they cost that do not run, and a batch whose rows use different ones.

    python benchmarks/adapters.py [--model smollm2-135m] [--rounds 7] [--json]

Two tables, both LoRA of r = 8 on all linear maps of a bf16 base, in one process; a round runs each way once, so a
machine that slows down slows all of them; figures are medians over rounds, ratios are taken round by round.

    loaded      with 1, 10 and 100 adapters loaded: `set_adapter` to the one that runs, a switch between two, a forward
    rows        a forward, and some steps of decoding, over 8 rows: one adapter for all, or 8 by `adapter_names`; by us
                and by HF PEFT; `first`: rows that were not seen before, so that factors are stacked anew
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import peft
import torch

import slimtune
from slimtune.core.models.loader import load_base

SETTINGS = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "inference_mode": True,
            "init_lora_weights": False}  # fmt: skip
LOADED = (1, 10, 100)
ROWS = 8


def adapted(home, spec: str, dtype: str, count: int):
    """A base with `count` adapters, `a0` active."""
    model = home.get_peft_model(load_base(spec, dtype=dtype).model, home.LoraConfig(**SETTINGS), "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", home.LoraConfig(**SETTINGS))
    model.requires_grad_(False)
    return model.eval()


def seconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def rounds_of(ways: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first round warms up."""
    found: dict[str, list[float]] = {n: [] for n in ways}
    for turn in range(rounds + 1):
        for name, (call, times) in ways.items():
            took = seconds(call, times)
            if turn:
                found[name].append(took)
    return found


def table(found: dict[str, list[float]], against: dict[str, str]) -> dict[str, dict]:
    """Median milliseconds of each way, and its median ratio to another."""
    rows = {}
    for name, took in found.items():
        ratio = [a / b for a, b in zip(took, found[against[name]], strict=True)]
        rows[name] = {"ms": round(1e3 * statistics.median(took), 3), "ratio": round(statistics.median(ratio), 3)}
    return rows


def loaded(spec: str, dtype: str, rounds: int, ids: torch.Tensor) -> dict[str, dict]:
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    against = {}
    for count in LOADED:
        model, last = adapted(slimtune, spec, dtype, count), f"a{count - 1}"
        names = itertools.cycle(["a0", last])
        ways[f"set_adapter, {count} loaded"] = (lambda m=model, n=last: m.set_adapter(n, inference_mode=True), 20)
        if count > 1:
            ways[f"switch, {count} loaded"] = (lambda m=model, n=names: m.set_adapter(next(n), inference_mode=True), 20)
        ways[f"forward, {count} loaded"] = (lambda m=model: m(ids), 1)
    against = {n: next(m for m in ways if m.split(",")[0] == n.split(",")[0]) for n in ways}
    return table(rounds_of(ways, rounds), against)


def mixed(spec: str, dtype: str, rounds: int, ids: torch.Tensor, decoded: int) -> dict[str, dict]:
    ours, fresh, theirs = (adapted(home, spec, dtype, ROWS) for home in (slimtune, slimtune, peft))
    names = [f"a{i}" for i in range(ROWS)]
    orders = itertools.cycle([names[i:] + names[:i] for i in range(ROWS)])
    how: dict = {"max_new_tokens": decoded, "min_new_tokens": decoded, "do_sample": False, "pad_token_id": 0}
    how |= {"attention_mask": torch.ones_like(ids)}
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "forward: slimtune, one adapter": (lambda: ours(ids), 1),
        "forward: slimtune, 8 adapters": (lambda: ours(ids, adapter_names=names), 1),
        "forward: slimtune, 8 first": (lambda: fresh(ids, adapter_names=next(orders)), 1),
        "forward: peft, one adapter": (lambda: theirs(input_ids=ids), 1),
        "forward: peft, 8 adapters": (lambda: theirs(input_ids=ids, adapter_names=names), 1),
        "decode: slimtune, one adapter": (lambda: ours.generate(ids, **how), 1),
        "decode: slimtune, 8 adapters": (lambda: ours.generate(ids, adapter_names=names, **how), 1),
        "decode: peft, one adapter": (lambda: theirs.generate(input_ids=ids, **how), 1),
        "decode: peft, 8 adapters": (lambda: theirs.generate(input_ids=ids, adapter_names=names, **how), 1),
    }
    return table(rounds_of(ways, rounds), {n: f"{n.split(',')[0]}, one adapter" for n in ways})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--decoded", type=int, default=16, help="tokens generated in a round of decoding")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(10, 100, (ROWS, args.length))
    tables = {
        "loaded": loaded(args.model, args.dtype, args.rounds, ids[:1, :8]),
        "rows": mixed(args.model, args.dtype, args.rounds, ids, args.decoded),
    }
    if not args.json:
        print(f"{args.model}, {args.dtype}, r = {SETTINGS['r']}, {ROWS} rows of {args.length} tokens, "
              f"{args.rounds} rounds, {torch.get_num_threads()} threads")  # fmt: skip
        for rows in tables.values():
            print()
            for name, row in rows.items():
                print(f"{name:34} {row['ms']:10.2f} ms   {row['ratio']:6.2f}× the first of its kind")
        print()
    facts = {"model": args.model, "dtype": args.dtype, "rounds": args.rounds, "threads": torch.get_num_threads()}
    print(json.dumps({**facts, "length": args.length, "decoded": args.decoded, **tables}))


if __name__ == "__main__":
    main()
