"""Loss of runs in 16 bits beside the same runs in float32: SmolLM2-135M, 200 steps of 2 short rows.

    J=JOBS/translation     # of benchmarks/first_run_jobs.py
    for way in full-float32 full-bfloat16 lora-float32 lora-float16; do
        python benchmarks/low_precision.py $J --column instruction=French --column output=English --way $way --out OUT
    done
    python benchmarks/low_precision.py --table benchmarks/data/low_precision.jsonl

Each run adds a line to OUT/low_precision.jsonl. `full-nearest` is full fine-tuning in bf16 whose steps are rounded to
the nearest value: what is lost without stochastic rounding. CPUs multiply float16 slowly, so its products are computed
in float32 and rounded to float16, as a GPU does: overflow and underflow of every tensor are those of float16.
`--loss-scale` starts there; 2**40 overflows at once.
"""

import argparse
import gc
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from slimtune.core.config import load_recipe
from slimtune.core.training import resuming
from slimtune.core.training.train import train
from slimtune.extras import stochastic_rounding

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
FULL_IN_BF16 = {"method.name": "full", "method.bf16_stochastic_round": True, "model.dtype": "bfloat16"}
WAYS: dict[str, dict[str, Any]] = {
    "lora-float32": {"model.dtype": "float32"},
    "lora-float16": {"model.dtype": "float16"},
    "full-float32": {"method.name": "full", "model.dtype": "float32"},
    "full-bfloat16": FULL_IN_BF16,
    "full-bfloat16-8bit": {**FULL_IN_BF16, "train.optimizer": "adamw-8bit"},
    "full-nearest": FULL_IN_BF16,
}
TITLES = {
    "lora-float16": "LoRA in float16, dynamic loss scale",
    "full-bfloat16": "full fine-tuning in bf16, `bf16_stochastic_round`",
    "full-bfloat16-8bit": "the same with `adamw-8bit`",
    "full-nearest": "the same, each step rounded to the nearest value",
}


class RoundedProducts(TorchDispatchMode):
    """Computes products of float16 tensors in float32 and rounds the result."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or args[0].dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        self.frozen = self.frozen or find_frozen_weights_in_float32()
        return func(*tree_map(self.widen, args), **(kwargs or {})).half()

    def widen(self, x: Any) -> Any:
        """Return a tensor in float32; those of frozen weights are kept."""
        if not isinstance(x, torch.Tensor):
            return x
        weight = self.frozen.get(x.untyped_storage().data_ptr())
        return x.float() if weight is None else weight.as_strided(x.shape, x.stride(), x.storage_offset())


def find_frozen_weights_in_float32() -> dict[int, torch.Tensor]:
    """Return every frozen float16 parameter of this process in float32, by the address of its storage."""
    parameters = [p for p in gc.get_objects() if isinstance(p, nn.Parameter)]
    frozen = [p for p in parameters if p.dtype == torch.float16 and not p.requires_grad and not p.is_meta]
    return {p.untyped_storage().data_ptr(): p.detach().float() for p in frozen if p.storage_offset() == 0}


def read_losses(run: Path) -> list[float]:
    """Return the logged training losses of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def run_in(way: str, job: Path, columns: list[str], steps: int, out: Path) -> dict[str, Any]:
    """Train on a job's rows in one way; return what counts."""
    values = {
        "model": "smollm2-135m", "data.train": job / "train.csv",
        "data.validation": job / "held_out.csv", "train.max_steps": steps, "train.batch_size": 2,
        "train.forgetting_budget": "null", "output_dir": out / way,
        **{f"data.columns.{c.partition('=')[0]}": c.partition("=")[2] for c in columns}, **WAYS[way],
    }  # fmt: skip
    recipe = load_recipe(None, overrides=[f"{name}={value}" for name, value in values.items()])
    if way == "full-nearest":
        stochastic_rounding.store_rounded_stochastically = lambda values, into: into.copy_(values)
    with RoundedProducts() if way == "lora-float16" else nullcontext():
        result = train(recipe)
    newest = max((out / way / "checkpoints").iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    state = json.loads((newest / "training_state.json").read_text())
    return {"way": way, "steps": steps, "rows": job.name, "validation": result.validation_loss,
            "scale": state["loss_scale"], "skipped": state["skipped_steps"],
            "cpu_seconds": round(state["train_cpu_seconds"], 1), "losses": read_losses(out / way)}  # fmt: skip


def make_table(records: Path) -> str:
    """Return a Markdown table of each way beside float32, from the recorded runs."""
    runs = {run["way"]: run for run in map(json.loads, records.read_text().splitlines())}
    lines = [
        "| 200 steps beside float32 | held-out loss | in float32 | difference | mean difference of a step's loss | "
        "largest | skipped steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, title in TITLES.items():
        if way in runs:
            run, wide = runs[way], runs[way.split("-")[0] + "-float32"]
            apart = [a - b for a, b in zip(run["losses"], wide["losses"], strict=True)]
            lines.append(
                f"| {title} | {run['validation']:.4f} | {wide['validation']:.4f} | "
                f"{run['validation'] - wide['validation']:+.4f} | {sum(apart) / len(apart):+.4f} | "
                f"{max(map(abs, apart)):.4f} | {run['skipped']} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run one way, or print the table of those that ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, nargs="?")
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loss-scale", type=float, default=resuming.INITIAL_LOSS_SCALE)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(make_table(args.table))
        return
    resuming.INITIAL_LOSS_SCALE = args.loss_scale
    args.out.mkdir(parents=True, exist_ok=True)
    found = run_in(args.way, args.job, args.column, args.steps, args.out)
    with (args.out / "low_precision.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")
    tail = found["losses"][-args.steps // 10 :]
    print({k: v for k, v in found.items() if k != "losses"}, "mean of the last losses", sum(tail) / len(tail))


if __name__ == "__main__":
    main()
