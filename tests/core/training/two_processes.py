"""What `test_processes.py` runs in each of two processes over gloo; the first one writes what was found as JSON.

RANK=0 WORLD_SIZE=2 … python two_processes.py CHECK,CHECK SETTINGS.json OUT.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.method_registry import get_method_config_class
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.config import Recipe
from slimtune.core.data.collator import Collator
from slimtune.core.data.step_sharding import DataParallelSharder
from slimtune.core.foundation import distributed
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import forward_backward
from slimtune.core.training.memory_savings import apply_memory_savings, shard_base_with_fsdp
from slimtune.core.training.train import train
from slimtune.errors import DataError, SlimtuneError, UnsupportedTargetError, UsageError

METHODS = {
    "lora": {"r": 4},
    "lora, 16 bits": {"r": 4},
    "lora, DoRA": {"r": 4, "use_dora": True},
    "hira": {},
    "oft": {},
    "ia3": {},
    "bottleneck": {},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "lora on the head": {"r": 2, "modules_to_save": ["lm_head"]},
}


def rows_of_step(n: int) -> list[dict[str, Any]]:
    start = [(5 * i) % 250 for i in range(9)]
    rows = [[*start, *((7 * i * i + 3 + 11 * r) % 250 for i in range(3 + 4 * r))] for r in range(n)]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in rows]


def compute_gradients(
    name: str, base: str, rows: int, *, alone: bool, shard: bool = False, checkpointing: bool = False
) -> dict[str, torch.Tensor]:
    """Return a step's gradients by parameter's name, all processes' summed, or those of this process alone."""
    model: Any = load_base(base, dtype="bfloat16" if "16 bits" in name else "float32", device="cpu").model
    torch.manual_seed(0)
    config = get_method_config_class(name.split()[0].strip(","))(task_type="CAUSAL_LM", **METHODS[name])
    model = get_peft_model(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    apply_memory_savings(model, checkpointing)
    processes, rank = (1, 0) if alone else (distributed.world_size(), distributed.rank())
    if shard:
        shard_base_with_fsdp(model, init_device_mesh("cpu", (processes,)), torch.device("cpu"))
        frozen = [p for p in model.parameters() if not p.requires_grad and isinstance(p, DTensor)]
        assert 2 * sum(p.to_local().numel() for p in frozen) == sum(p.numel() for p in frozen) > 0
    part = DataParallelSharder(Collator(0, with_packed_layout=True, max_tokens=30), 32, processes, rank)(
        rows_of_step(rows)
    )
    with using_packed_attention(model.train()):
        for _ in range(2 if shard else 1):  # gathered weights that a pass leaves must not change the next
            model.zero_grad()
            forward_backward(
                model,
                part["micro_batches"],
                num_items=part["targets"],
                micro_batch_weights=part["weights"],
                add_regularization=rank == 0,
            )
    if not alone:
        distributed.sum_gradients(p for p in model.parameters() if p.requires_grad)
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def check_gradients(settings: dict[str, Any]) -> dict[str, float]:
    """Compare with one process: base whole or sharded, activation checkpointing on or off, a process without rows."""
    distributed.create_process_group_if_needed()
    base, errors = settings["model"]["name"], {}
    for number, name in enumerate(METHODS):
        for rows, shard, checkpointing in ((7, False, number % 2 == 0), (7, True, number % 2 == 1), (1, True, False)):
            one = compute_gradients(name, base, rows, alone=True)
            both = compute_gradients(name, base, rows, alone=False, shard=shard, checkpointing=checkpointing)
            assert both.keys() == one.keys()
            error = max(((both[k] - g).norm() / g.norm().clamp_min(1e-8)).item() for k, g in one.items())
            errors[f"{name}, {rows} rows, sharded {shard}, checkpointing {checkpointing}"] = error
    return errors


def check_fsdp1(settings: dict[str, Any]) -> str:
    """Return the hint of the error with which FSDP1 refuses an adapted model."""
    distributed.create_process_group_if_needed()
    model = get_peft_model(load_base(settings["model"]["name"], dtype="float32", device="cpu").model, LoraConfig())
    try:
        FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    except UnsupportedTargetError as e:
        return e.hint
    return ""


def check_runs(settings: dict[str, Any]) -> dict[str, Any]:
    """Train with the base whole, sharded, and resumed, or with other sections of the recipe."""
    distributed.create_process_group_if_needed()
    out = Path(settings["output_dir"])
    found = {}
    for name, more in settings.pop("runs").items():
        train_settings = {**settings["train"], **more["train"]}
        sections = {**settings, **more.get("sections", {}), "train": train_settings, "output_dir": str(out / name)}
        recipe = Recipe.from_dict(sections)
        found[name] = to_json_dict(train(recipe, resume=more.get("resume", False)))
    return found


def run_trainer(base: str, out: str, rows: int) -> dict[str, Any]:
    """Train by transformers' own Trainer, which wraps the model in DDP, with so many rows a process."""
    torch.manual_seed(3)
    model = get_peft_model(load_base(base, dtype="float32", device="cpu").model, LoraConfig(r=4, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        out, max_steps=10, per_device_train_batch_size=rows, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, seed=3, data_seed=3, dataloader_pin_memory=False,
    )  # fmt: skip

    def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        size = max(len(e["input_ids"]) for e in examples)
        fill = {"input_ids": 0, "labels": -100}
        return {k: torch.tensor([e[k] + [v] * (size - len(e[k])) for e in examples]) for k, v in fill.items()}

    trainer = Trainer(model, args, train_dataset=rows_of_step(24), data_collator=pad)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
    wrapped = type(trainer.model_wrapped).__name__
    return {"losses": [h["loss"] for h in trainer.state.log_history if "loss" in h], "wrapped": wrapped}


def check_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    return run_trainer(settings["model"]["name"], settings["output_dir"], 3)


def check_errors(settings: dict[str, Any]) -> dict[str, Any]:
    """Meet an error in one process, an error in all, and what is summed."""
    distributed.create_process_group_if_needed()

    def raise_in(kind: type[SlimtuneError], ranks: list[int]) -> Callable[[], Any]:
        def work() -> None:
            if distributed.rank() in ranks:
                raise kind("message", "expected", "hint")

        return work

    found: dict[str, Any] = {}
    for name, run, kind, ranks in (
        ("second", distributed.run_on_all_ranks, DataError, [1]),
        ("all", distributed.run_on_all_ranks, UsageError, [0, 1]),
        ("first", lambda work: distributed.runs_on_main_and_broadcasts(work)(), DataError, [0]),
    ):
        try:
            run(raise_in(kind, ranks))
        except SlimtuneError as e:
            found[name] = [type(e).__name__, e.message, e.expected, e.hint, e.exit_code]
    every = distributed.all_gather_object(found)
    assert every[0].keys() == every[1].keys()
    some, none, half = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    some.grad = torch.full((2, 3), 1.0 + distributed.rank())
    if distributed.rank() == 1:
        half.grad = torch.ones(2, 3)
    distributed.sum_gradients([some, none, half])
    found["sums"] = [some.grad.tolist(), none.grad, half.grad.tolist()]
    found["main"] = distributed.runs_on_main_and_broadcasts(distributed.rank)()
    return found


if __name__ == "__main__":
    checks, given, out = sys.argv[1:]
    torch.set_num_threads(1)
    settings = json.loads(Path(given).read_text())
    result = {check: globals()[f"check_{check}"](settings) for check in checks.split(",")}
    if distributed.is_main_process():
        Path(out).write_text(json.dumps(result))
    distributed.wait_and_destroy_process_group()
