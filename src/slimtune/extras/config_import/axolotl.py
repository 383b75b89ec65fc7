"""Axolotl's YAML: https://github.com/axolotl-ai-cloud/axolotl/tree/main/examples."""

from collections.abc import Mapping
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, choose, lack, refuse, skip, take, to_bool, to_list, to_targets
from .source_file import SourceFile
from .training_arguments import OPTIMIZERS, TRAINING_ARGUMENTS, take_scheduler, take_switch, take_warmup_ratio

NAME = "axolotl"
MARKS = frozenset({
    "base_model", "datasets", "sequence_len", "micro_batch_size", "sample_packing", "adapter", "lora_target_linear",
    "num_epochs", "val_set_size",
})  # fmt: skip
_TASKS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_FORMATS = {"alpaca": "instruction", "sharegpt": "sharegpt", "completion": "document"}


def _take_adapter(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in ("lora", "qlora"):
        raise refuse("adapter", value, "lora or qlora; without adapter, all weights are trained")
    quantization = {"model.quantization": "nf4"} if value == "qlora" else {}
    return FieldOutcome("taken", {"method.name": "lora", **quantization})


def _take_datasets(value: Any, _: JsonObject) -> FieldOutcome:
    entries = [entry for entry in to_list(value) if isinstance(entry, dict)]
    if not entries or not entries[0].get("path"):
        return FieldOutcome("no-equivalent", reason="a dataset needs its path")
    first = entries[0]
    kind = (
        str(first.get("type") or "").partition(":")[0].partition(".")[0]
        if not isinstance(first.get("type"), dict)
        else ""
    )
    settings: dict[str, Any] = {"data.train": (to_list(first.get("data_files") or []) or [first["path"]])[0]}
    names = first.get("message_property_mappings") or {}
    if kind == "chat_template" and (names.get("role"), names.get("content")) == ("from", "value"):
        kind = "sharegpt"
    if kind in _FORMATS:
        settings["data.format"] = _FORMATS[kind]
    unread = {*first} - {"path", "type", "data_files", "ds_type", "message_property_mappings", "split", "roles"}
    reasons = [f"not taken from it: {', '.join(sorted(unread))}"] if unread else []
    if len(entries) > 1:
        reasons.append(f"one dataset is read: without {', '.join(str(e.get('path')) for e in entries[1:])}")
    return FieldOutcome("taken", settings, "; ".join(reasons))


def _take_task(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in _TASKS:
        raise refuse("rl", value, f"one of {', '.join(_TASKS)}")
    return FieldOutcome("taken", {"task.name": _TASKS[value], **({"task.loss_type": "ipo"} if value == "ipo" else {})})


def _take_beta(value: Any, values: JsonObject) -> FieldOutcome:
    if values.get("rl") not in _TASKS:
        return FieldOutcome("not-needed", reason="the task has no preferences")
    return FieldOutcome("taken", {"task.beta": float(value)})


def _take_target_linear(value: Any, _: JsonObject) -> FieldOutcome:
    if not to_bool(value):
        return FieldOutcome("not-needed", reason="it is off")
    return FieldOutcome("taken", {"method.target_modules": "all-linear"})


def _take_evaluations(value: Any, _: JsonObject) -> FieldOutcome:
    if float(value) == 1:
        return FieldOutcome("not-needed", reason="once in an epoch is the default")
    return FieldOutcome("no-equivalent", reason="train.eval_steps and train.save_steps are numbers of steps")


def _take_fraction(value: Any, _: JsonObject) -> FieldOutcome:
    if 0 <= float(value) <= 0.5:
        return FieldOutcome("taken", {"data.validation_fraction": float(value)})
    return FieldOutcome("no-equivalent", reason="data.validation_fraction is a share, 0.5 at most")


def _take_checkpointing(value: Any, _: JsonObject) -> FieldOutcome:
    if str(value) not in ("offload", "offload_disk", "unsloth"):
        return FieldOutcome("taken", {"train.gradient_checkpointing": to_bool(value)})
    return FieldOutcome("taken", {"train.gradient_checkpointing": True, "train.offload_activations": True})


_KERNELS = skip("slimtune chooses its own kernels and attention")
_CACHE = skip("tokenized rows are cached by their content")
_WATCH = skip("train.on_nonfinite and the forgetting budget watch the run")
_CLASS = skip("the base's config says it")
RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "base_model": take("model.name", str),
    "revision_of_model": take("model.revision", str),
    "model_type": _CLASS, "tokenizer_type": _CLASS, "base_model_config": _CLASS, "tokenizer_config": _CLASS,
    "is_llama_derived_model": _CLASS, "is_mistral_derived_model": _CLASS, "processor_type": _CLASS,
    "load_in_8bit": take_switch("model.quantization", "int8"),
    "load_in_4bit": take_switch("model.quantization", "nf4"),
    "strict": skip("unknown settings are always errors"),
    "adapter": _take_adapter,
    "lora_r": take("method.r", int),
    "lora_alpha": take("method.lora_alpha", float),
    "lora_dropout": take("method.lora_dropout", float),
    "lora_target_modules": take("method.target_modules", to_targets),
    "lora_target_linear": _take_target_linear,
    "lora_modules_to_save": take("method.modules_to_save", to_list),
    "lora_fan_in_fan_out": skip("the layer's class says it"),
    "lora_model_dir": lack("give the adapter to train on: --init-adapter"),
    "peft_use_rslora": take("method.use_rslora", to_bool), "peft_use_dora": take("method.use_dora", to_bool),
    "lora_mlp_kernel": _KERNELS, "lora_qkv_kernel": _KERNELS, "lora_o_kernel": _KERNELS, "plugins": _KERNELS,
    "loraplus_lr_ratio": take("method.lr_ratio", float),
    "peft": lack("its settings are fields of `method`"),
    "datasets": _take_datasets,
    "test_datasets": lack("data.validation names a file"),
    "dataset_prepared_path": _CACHE, "dataset_processes": _CACHE, "shuffle_merged_datasets": skip("rows are shuffled"),
    "val_set_size": _take_fraction,
    "chat_template": skip("the base's own chat template is used; data.chat_template names another"),
    "default_system_message": lack("write a system message into the rows"),
    "special_tokens": lack("the tokens stay the base's"), "tokens": lack("the vocabulary stays the base's"),
    "eot_tokens": skip("the chat template says where an answer ends"),
    "sequence_len": take("data.max_seq_len", int),
    "sample_packing": take("train.packing", to_bool),
    "eval_sample_packing": skip("evaluation packs, too"), "pad_to_sequence_len": skip("packed rows need no padding"),
    "train_on_inputs": lack("the loss is of the answers"),
    "rl": _take_task, "rl_beta": _take_beta, "dpo_beta": _take_beta, "orpo_alpha": _take_beta,
    "kto_desirable_weight": take("task.desirable_weight", float),
    "kto_undesirable_weight": take("task.undesirable_weight", float),
    "micro_batch_size": take("train.batch_size", int),
    "eval_batch_size": skip("evaluation packs as many rows as fit in memory"),
    "batch_size": lack("train.batch_size · train.gradient_accumulation_steps is the whole batch"),
    "num_epochs": take("train.epochs", float),
    "optimizer": choose("train.optimizer", OPTIMIZERS),
    "lr_scheduler": take_scheduler,
    "cosine_min_lr_ratio": lack("the schedule ends at 0"),
    "warmup_ratio": take_warmup_ratio,
    "evals_per_epoch": _take_evaluations, "saves_per_epoch": _take_evaluations,
    "early_stopping_patience": take("train.early_stopping_patience", int),
    "unfrozen_parameters": lack("an adapter trains its own parameters alone"),
    "wandb_project": take("train.report_to", lambda _: ["wandb"]),
    "wandb_entity": lack("wandb's own variables name it"), "wandb_name": lack("the run folder names it"),
    "wandb_watch": lack("gradients are not uploaded"), "wandb_log_model": lack("slimtune push uploads"),
    "loss_watchdog_threshold": _WATCH, "loss_watchdog_patience": _WATCH,
    "eval_table_size": skip("`slimtune generate` shows answers"),
    "eval_max_new_tokens": skip("`slimtune eval --generate` has --max-new-tokens"),
    "flash_attention": _KERNELS, "xformers_attention": _KERNELS, "sdp_attention": _KERNELS,
    "flash_attn_rms_norm": _KERNELS, "flash_attn_cross_entropy": _KERNELS, "s2_attention": lack("no LongLoRA"),
    "gradient_checkpointing": _take_checkpointing,
    "activation_offloading": take("train.offload_activations", to_bool),
    "fsdp_version": lack("train.fsdp is FSDP2"), "save_first_step": lack("train.save_steps says when"),
    "gptq": skip("the checkpoint says it"), "debug": skip("nothing is changed by it"),
    "bfloat16": take_switch("model.dtype", "bfloat16"),
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {
    "sequence_len": 512, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1.0,
    "lr_scheduler": "cosine", "val_set_size": 0.0, "lora_dropout": lambda v: 0.0 if v.get("adapter") else None,
}  # fmt: skip
"""https://github.com/axolotl-ai-cloud/axolotl/tree/main/src/axolotl/utils/schemas."""


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields; without an adapter all weights are trained."""
    if source.values.get("adapter"):
        return source
    return SourceFile(source.path, source.values, settings={"method.name": "full"})
