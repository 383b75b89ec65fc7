"""Fields that transformers' TrainingArguments declare: LLaMA-Factory, ms-swift and TRL all read them."""

from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, choose, lack, skip, take, to_bool, to_list

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw-8bit"),
}
SCHEDULERS = {
    "cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt",
    "polynomial": "polynomial", "cosine_with_restarts": "cosine_with_restarts",
}  # fmt: skip
DTYPES = {
    "bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "bf16": "bfloat16", "fp16": "float16",
    "fp32": "float32", "auto": "auto",
}  # fmt: skip
_SPEED = skip("slimtune chooses its own kernels and attention")
_WORKERS = skip("rows are tokenized once, and nothing waits for workers")
_RUN_FOLDER = skip("a run folder has its own logs, checkpoints and report")


def take_scheduler(value: Any, _: JsonObject) -> FieldOutcome:
    """Take a schedule; "constant" of transformers has no warm-up."""
    if value == "constant":
        return FieldOutcome("taken", {"train.lr_scheduler": "constant", "train.warmup_ratio": 0.0})
    return choose("train.lr_scheduler", SCHEDULERS)(value, {})


def take_warmup_ratio(value: Any, values: JsonObject) -> FieldOutcome:
    """Take a share of the steps, if the schedule warms up."""
    if values.get("lr_scheduler_type") == "constant":
        return FieldOutcome("not-needed", reason="transformers' constant schedule has no warm-up")
    return FieldOutcome("taken", {"train.warmup_ratio": float(value)})


def take_warmup_steps(value: Any, values: JsonObject) -> FieldOutcome:
    """Take a number of steps as their share of all steps, where these are known; below 1 it is a share already."""
    number = float(value)
    steps = float(values.get("max_steps") or 0)
    if 0 < number < 1 or steps > number:
        return FieldOutcome("taken", {"train.warmup_ratio": number if number < 1 else number / steps})
    if number == 0:
        return FieldOutcome("not-needed", reason="it is off")
    return FieldOutcome("no-equivalent", reason="train.warmup_ratio is a share of the steps, whose number is not known")


def take_switch(path: str, value: Any) -> Rule:
    """Return the rule of a switch that sets a value if it is on; text such as "auto" counts as off."""

    def apply(given: Any, _: JsonObject) -> FieldOutcome:
        return (
            FieldOutcome("taken", {path: value}) if to_bool(given) else FieldOutcome("not-needed", reason="it is off")
        )

    return apply


def take_whole_steps(path: str) -> Rule:
    """Return the rule of a number of steps; a share of all steps has no equivalent."""

    def apply(value: Any, _: JsonObject) -> FieldOutcome:
        if (number := float(value)) >= 1 and number.is_integer():
            return FieldOutcome("taken", {path: int(number)})
        return FieldOutcome("no-equivalent", reason=f"{path} is a number of steps")

    return apply


def take_trackers(value: Any, _: JsonObject) -> FieldOutcome:
    """Take experiment trackers."""
    names = [name for name in to_list(value) if name not in ("none", "all")]
    known = {"clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"}
    if not names:
        return FieldOutcome("not-needed", reason="it is off")
    if lacking := [name for name in names if name not in known]:
        return FieldOutcome("no-equivalent", reason=f"train.report_to has no {lacking[0]}")
    return FieldOutcome("taken", {"train.report_to": names})


def take_max_steps(value: Any, _: JsonObject) -> FieldOutcome:
    """Take a number of steps; -1 means epochs."""
    is_given = float(value) > 0
    return (
        FieldOutcome("taken", {"train.max_steps": int(value)})
        if is_given
        else FieldOutcome("not-needed", reason="epochs count")
    )


TRAINING_ARGUMENTS: dict[str, Rule] = {
    "output_dir": take("output_dir", str),
    "learning_rate": take("train.learning_rate", float),
    "num_train_epochs": take("train.epochs", float),
    "max_steps": take_max_steps,
    "per_device_train_batch_size": take("train.batch_size", int),
    "gradient_accumulation_steps": take("train.gradient_accumulation_steps", int),
    "lr_scheduler_type": take_scheduler,
    "warmup_ratio": take_warmup_ratio,
    "warmup_steps": take_warmup_steps,
    "weight_decay": take("train.weight_decay", float),
    "max_grad_norm": take("train.max_grad_norm", float),
    "optim": choose("train.optimizer", OPTIMIZERS),
    "seed": take("train.seed", int),
    "logging_steps": take_whole_steps("train.logging_steps"),
    "save_steps": take_whole_steps("train.save_steps"),
    "eval_steps": take_whole_steps("train.eval_steps"),
    "save_total_limit": take("train.save_total_limit", int),
    "gradient_checkpointing": take("train.gradient_checkpointing", to_bool),
    "torch_compile": take("train.compile", to_bool),
    "bf16": take_switch("model.dtype", "bfloat16"),
    "fp16": take_switch("model.dtype", "float16"),
    "report_to": take_trackers,
    "lr_scheduler_kwargs": lack("the schedules have no further settings"),
    "adam_beta1": lack("AdamW's betas are 0.9 and 0.999"),
    "adam_beta2": lack("AdamW's betas are 0.9 and 0.999"),
    "adam_epsilon": lack("AdamW's epsilon is 1e-8"),
    "neftune_noise_alpha": lack("there is no noise on embeddings"),
    "deepspeed": lack("several processes shard the base by train.fsdp"),
    "fsdp": lack("set train.fsdp: true, and start with torchrun"),
    "fsdp_config": lack("train.fsdp has no further settings"),
    "trust_remote_code": lack("no file may ask for it: give the flag --trust-remote-code"),
    "resume_from_checkpoint": lack("checkpoints of other trainers are not read: --init-adapter takes their adapter"),
    "push_to_hub": lack("slimtune push uploads after the training"),
    "hub_model_id": lack("slimtune push uploads after the training"),
    "label_smoothing_factor": lack("the cross-entropy is not smoothed"),
    "group_by_length": skip("rows are packed, so their lengths waste nothing"),
    "eval_strategy": skip("rows for validation are evaluated, at train.eval_steps or after each epoch"),
    "save_strategy": skip("checkpoints are written at each evaluation, or at train.save_steps"),
    "logging_strategy": skip("train.logging_steps says when"),
    "metric_for_best_model": skip("the checkpoint with the lowest validation loss is kept"),
    "greater_is_better": skip("the checkpoint with the lowest validation loss is kept"),
    "load_best_model_at_end": skip("the checkpoint with the lowest validation loss is kept"),
    "per_device_eval_batch_size": skip("evaluation packs as many rows as fit in memory"),
    "gradient_checkpointing_kwargs": skip("it is exact here"),
    "remove_unused_columns": skip("columns that are not read are left out"),
    "run_name": _RUN_FOLDER, "logging_dir": _RUN_FOLDER, "overwrite_output_dir": _RUN_FOLDER,
    "save_only_model": _RUN_FOLDER, "log_level": _RUN_FOLDER, "logging_first_step": _RUN_FOLDER,
    "do_train": skip("`slimtune train` trains"), "do_eval": skip("`slimtune eval` evaluates"),
    "dataloader_num_workers": _WORKERS, "dataloader_pin_memory": _WORKERS, "dataset_num_proc": _WORKERS,
    "tf32": _SPEED, "attn_implementation": _SPEED, "attn_impl": _SPEED, "use_liger_kernel": _SPEED,
    "ddp_timeout": skip("processes wait for one another"), "ddp_find_unused_parameters": _SPEED,
    "local_rank": skip("torchrun gives it"),
}  # fmt: skip
