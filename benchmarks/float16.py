"""Loss of a run in float16 beside the same run in float32: SmolLM2-135M, 200 steps of 4 rows of a recipe.

    python benchmarks/float16.py examples/devils-dictionary.yaml --steps 200 --out OUT

CPUs multiply float16 slowly, so its products are computed in float32 and rounded to float16, as a GPU does. Overflow
and underflow of every tensor are those of float16. `--loss-scale` starts there; 2**40 overflows at once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from slimtune.core.config import load_recipe
from slimtune.core.training import resuming
from slimtune.core.training.train import train

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class RoundedProducts(TorchDispatchMode):
    """Computes products of float16 tensors in float32 and rounds the result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or args[0].dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        wide = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, args)
        return func(*wide, **(kwargs or {})).half()


def read_losses(run: Path) -> list[float]:
    """Return the logged training losses of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def run_in(dtype: str, recipe_file: Path, steps: int, out: Path) -> dict[str, Any]:
    """Train a recipe in a dtype; return what counts."""
    more = {"model.dtype": dtype, "train.max_steps": steps, "train.batch_size": 4, "train.logging_steps": 1}
    sets = [f"{key}={value}" for key, value in more.items()] + ["train.forgetting_budget=null", "train.epochs=4"]
    recipe = load_recipe(recipe_file, overrides=[*sets, f"output_dir={out / dtype}"])
    with RoundedProducts():  # float32 passes through it as it is
        result = train(recipe)
    newest = max((out / dtype / "checkpoints").iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    state = json.loads((newest / "training_state.json").read_text())
    losses = read_losses(out / dtype)
    return {"losses": losses, "validation": result.validation_loss, "scale": state["loss_scale"],
            "skipped": state["skipped_steps"]}  # fmt: skip


def main() -> None:
    """Print the losses of both runs and their largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loss-scale", type=float, default=resuming.INITIAL_LOSS_SCALE)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    resuming.INITIAL_LOSS_SCALE = args.loss_scale
    half = run_in("float16", args.recipe, args.steps, args.out)
    single = run_in("float32", args.recipe, args.steps, args.out)
    tail = max(1, args.steps // 10)
    means = [sum(r["losses"][-tail:]) / tail for r in (half, single)]
    apart = max(abs(a - b) for a, b in zip(half["losses"], single["losses"], strict=True))
    print(f"steps: {args.steps}; largest difference of a step's loss: {apart:.4f}; of the validation loss: "
          f"{half['validation'] - single['validation']:+.5f}; of the mean of the last {tail} steps: "
          f"{means[0] - means[1]:+.5f}")  # fmt: skip
    print(f"validation loss in float16 {half['validation']:.5f}, in float32 {single['validation']:.5f}; "
          f"loss scale at the end {half['scale']:g}; skipped steps {half['skipped']}")  # fmt: skip


if __name__ == "__main__":
    main()
