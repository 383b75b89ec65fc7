"""mlx-lm's LoRA config: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/examples/lora_config.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, lack, refuse, skip, take, to_bool
from .source_file import SourceFile
from .training_arguments import take_whole_steps

NAME = "mlx-lm"
MARKS = frozenset({
    "fine_tune_type", "lora_parameters", "iters", "adapter_path", "steps_per_report", "steps_per_eval", "num_layers",
    "max_seq_length", "grad_checkpoint", "val_batches", "lora_layers",
})  # fmt: skip


def _take_method(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in ("lora", "dora", "full"):
        raise refuse("fine_tune_type", value, "lora, dora or full")
    settings = {"method.name": "full" if value == "full" else "lora"}
    return FieldOutcome("taken", settings | ({"method.use_dora": True} if value == "dora" else {}))


def _take_data(value: Any, values: JsonObject) -> FieldOutcome:
    parent = values.get("mlx-lm:folder", Path())
    folder = Path(str(value)) if (Path(str(value)) / "train.jsonl").is_file() else parent / str(value)
    if (folder / "train.jsonl").is_file():
        files = {"train": "train", "validation": "valid", "test": "test"}
        there = {key: folder / f"{name}.jsonl" for key, name in files.items()}
        return FieldOutcome("taken", {f"data.{key}": str(file) for key, file in there.items() if file.is_file()})
    return FieldOutcome("taken", {"data.train": str(value)}, "the folder's train.jsonl was not found")


def _take_lora(value: Any, values: JsonObject) -> FieldOutcome:
    if values.get("fine_tune_type") == "full":
        return FieldOutcome("not-needed", reason="all weights are trained")
    rank = int(value.get("rank", 8))
    settings: dict[str, Any] = {
        "method.r": rank, "method.lora_alpha": float(value.get("scale", 20.0)) * rank,  # scale = alpha / r
        "method.lora_dropout": float(value.get("dropout", 0.0)),
    }  # fmt: skip
    if keys := value.get("keys"):
        settings["method.target_modules"] = [str(key).rpartition(".")[2] for key in keys]
    unread = sorted({*value} - {"rank", "scale", "dropout", "keys", "alpha"})
    return FieldOutcome("taken", settings, f"not taken from it: {', '.join(unread)}" if unread else "")


def _take_layers(value: Any, _: JsonObject) -> FieldOutcome:
    if int(value) == -1:
        return FieldOutcome("not-needed", reason="all layers are adapted")
    reason = f"it adapts the last {value} layers; method.layers_to_transform lists them: until then all are adapted"
    return FieldOutcome("no-equivalent", reason=reason)


def _take_schedule(value: Any, _: JsonObject) -> FieldOutcome:
    if not isinstance(value, dict) or value.get("name") != "cosine_decay":
        return FieldOutcome("no-equivalent", reason="train.lr_scheduler has no such schedule")
    arguments = value.get("arguments") or []
    rate = {"train.learning_rate": float(arguments[0])} if arguments else {}
    reason = f"warm-up of {value['warmup']} steps is not taken" if value.get("warmup") else ""
    return FieldOutcome("taken", {"train.lr_scheduler": "cosine", **rate}, reason)


def _take_optimizer(value: Any, _: JsonObject) -> FieldOutcome:
    if str(value).lower() in ("adam", "adamw"):
        decay = 0.01 if str(value).lower() == "adamw" else 0.0  # MLX's own defaults
        return FieldOutcome("taken", {"train.optimizer": "adamw", "train.weight_decay": decay})
    return FieldOutcome("no-equivalent", reason="train.optimizer is AdamW")


_PARTS = skip("validation and test rows are measured whole")
RULES: dict[str, Rule] = {
    "model": take("model.name", str), "fine_tune_type": _take_method, "data": _take_data,
    "train": skip("`slimtune train` trains"), "test": skip("`slimtune eval` tests"),
    "training_mode": lambda value, _: FieldOutcome("taken", {"task.name": "sft" if value == "normal" else value}),
    "seed": take("train.seed", int), "num_layers": _take_layers, "lora_layers": _take_layers,
    "batch_size": take("train.batch_size", int), "iters": take("train.max_steps", int),
    "grad_accumulation_steps": take("train.gradient_accumulation_steps", int),
    "val_batches": _PARTS, "test_batches": _PARTS,
    "learning_rate": take("train.learning_rate", float), "lr_schedule": _take_schedule,
    "steps_per_report": take_whole_steps("train.logging_steps"),
    "steps_per_eval": take_whole_steps("train.eval_steps"),
    "save_every": take_whole_steps("train.save_steps"), "adapter_path": take("output_dir", str),
    "resume_adapter_file": lack("give the adapter to train on: --init-adapter"),
    "max_seq_length": take("data.max_seq_len", int), "grad_checkpoint": take("train.gradient_checkpointing", to_bool),
    "lora_parameters": _take_lora, "optimizer": _take_optimizer,
    "clear_cache_threshold": skip("memory is slimtune's own choice"),
    "optimizer_config": lack("AdamW's betas are 0.9 and 0.999"),
    "mask_prompt": lambda value, _: FieldOutcome("not-needed", reason="it is what slimtune does")
    if to_bool(value) else FieldOutcome("no-equivalent", reason="the loss is of the answers, not of the prompts"),
    "hf_dataset": lack("data.train names a file, or a dataset"), "wandb": take("train.report_to", lambda _: ["wandb"]),
    "report_to": take("train.report_to", lambda v: v if isinstance(v, list) else [v]),
    "project_name": skip("the run folder names it"), "config": lack("give the YAML itself"),
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {
    "fine_tune_type": "lora", "learning_rate": 1e-5, "batch_size": 4, "iters": 1000, "max_seq_length": 2048,
    "num_layers": 16, "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "mask_prompt": False,
}  # fmt: skip
"""https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/lora.py."""


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields; without a schedule the rate is constant; long rows are cut, and gradients are not clipped."""
    settings: dict[str, Any] = {"data.on_overlong": "truncate", "train.max_grad_norm": 0}
    if not source.values.get("lr_schedule"):
        settings |= {"train.lr_scheduler": "constant", "train.warmup_ratio": 0.0}
    context = {"mlx-lm:folder": source.path.parent}
    return SourceFile(source.path, source.values, source.program, source.command, settings, context)
