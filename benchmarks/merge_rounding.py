"""A merge into 16 bits, each number rounded to its nearest (as PEFT does) and as `slimtune merge` rounds.

    python benchmarks/merge_rounding.py RUN [--dtype bfloat16]

|log p(next token | merged) - log p(next token | base with adapter)| over the rows of the merge's proof, which the run
was not trained on; both computed in fp32. `products` is what rounding changes in the maps' products on rows it was
trained on: the sum of squares, beside that of rounding to the nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from slimtune.adapters.merged_state import MergedState
from slimtune.export import proof
from slimtune.export.merge import _trained_dtype
from slimtune.export.rounding import Rounding, rounding_for
from slimtune.setup import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    loaded = load_run(args.run, dtype=_trained_dtype(args.run), device="cpu")
    model = loaded.model.to(torch.float32)
    rows = proof.texts(loaded.base.tokenizer, loaded.recipe, model.config.get_text_config())
    adapted = proof.log_probabilities(model, rows)
    with model.disable_adapter():
        effect = (adapted - proof.log_probabilities(model, rows)).abs().mean().item()
    ways = {"nearest": Rounding({}), "slimtune": rounding_for(model, loaded.recipe, loaded.base.tokenizer)}
    exact = {n: t.clone() for n, t in MergedState(model).items() if t.dim() == 2}
    plain = model.merge_and_unload()
    inputs = ways["slimtune"].inputs
    nearest = 0.0
    print(f"{args.run}: {len(adapted)} positions, on which the adapter moves log-probabilities by {effect:.2f} nats")
    print(f"{'rounding':9} {'mean |d|':>9} {'largest':>9} {'products':>9}")
    for way, rounding in ways.items():
        products = 0.0
        for name, weight in exact.items():
            stored = rounding(name, weight, dtype).float()
            plain.get_parameter(name).data.copy_(stored)
            if (x := inputs.get(name.removesuffix(".weight"))) is not None:
                products += ((stored - weight) @ x.t()).square().sum().item()
        nearest = nearest or products
        apart = (proof.log_probabilities(plain, rows) - adapted).abs()
        print(f"{way:9} {apart.mean():9.4f} {apart.max():9.4f} {products / nearest:9.3f}", flush=True)


if __name__ == "__main__":
    main()
