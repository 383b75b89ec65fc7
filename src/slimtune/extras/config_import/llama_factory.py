"""LLaMA-Factory's YAML: https://github.com/hiyouga/LLaMA-Factory/tree/main/examples."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, choose, expect, lack, refuse, skip, take, to_bool, to_list, to_targets
from .source_file import SourceFile
from .training_arguments import TRAINING_ARGUMENTS, take_switch

NAME = "llama-factory"
MARKS = frozenset(
    {"stage", "finetuning_type", "cutoff_len", "lora_target", "template", "pref_loss", "quantization_bit"}
)
_PREFERENCES = {
    "sigmoid": ("dpo", "sigmoid"), "hinge": ("dpo", "hinge"), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None),
    "simpo": ("simpo", None),
}  # fmt: skip
_STAGES = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}


def _take_stage(value: Any, values: JsonObject) -> FieldOutcome:
    if value not in _STAGES:
        raise refuse("stage", value, f"one of {', '.join(_STAGES)}")
    if value != "dpo":
        return FieldOutcome("taken", {"task.name": _STAGES[value]})
    task, loss = _PREFERENCES.get(values.get("pref_loss") or "sigmoid", (None, None))
    if task is None:
        raise refuse("pref_loss", values.get("pref_loss"), f"one of {', '.join(_PREFERENCES)}")
    return FieldOutcome("taken", {"task.name": task, **({"task.loss_type": loss} if loss else {})})


def _take_beta(value: Any, values: JsonObject) -> FieldOutcome:
    if values.get("stage") in ("dpo", "kto"):
        return FieldOutcome("taken", {"task.beta": float(value)})
    return FieldOutcome("not-needed", reason="the stage has no preferences")


def _take_dataset(value: Any, values: JsonObject) -> FieldOutcome:
    first, *others = to_list(value)
    file = values.get(f"{NAME}:files", {}).get(first, first)
    is_name = file == first and not {".", "/"} & {*first}
    reasons = ["a name of dataset_info.json: write the file"] if is_name else []
    if others:
        reasons.append(f"one file is read: without {', '.join(others)}")
    return FieldOutcome("taken", {"data.train": file}, "; ".join(reasons))


def _take_method(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in ("lora", "full", "oft"):
        raise refuse("finetuning_type", value, "lora, full or oft")
    return FieldOutcome("taken", {"method.name": value})


def _take_pissa(value: Any, values: JsonObject) -> FieldOutcome:
    if not to_bool(value):
        return FieldOutcome("not-needed", reason="it is off")
    rounds = int(values.get("pissa_iter") or 16)
    return FieldOutcome("taken", {"method.init_lora_weights": "pissa" if rounds < 0 else f"pissa_niter_{rounds}"})


def _of_lora(rule: Rule) -> Rule:
    """Return a rule that counts for LoRA alone."""

    def apply(value: Any, values: JsonObject) -> FieldOutcome:
        if (values.get("finetuning_type") or "lora") == "lora":
            return rule(value, values)
        return FieldOutcome("not-needed", reason="it is LoRA's")

    return apply


_CUT = {"data.on_overlong": "truncate"}
"""Longer rows are cut at cutoff_len, not left out."""
_CACHE, _WORKERS = skip("tokenized rows are cached by their content"), skip("rows are tokenized once")
_KERNELS = skip("slimtune chooses its own kernels")
RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": take("model.name", str),
    "stage": _take_stage,
    "finetuning_type": _take_method,
    "lora_rank": _of_lora(take("method.r", int)),
    "lora_alpha": _of_lora(take("method.lora_alpha", float)),
    "lora_dropout": _of_lora(take("method.lora_dropout", float)),
    "lora_target": _of_lora(take("method.target_modules", to_targets)),
    "additional_target": _of_lora(take("method.modules_to_save", to_list)),
    "use_rslora": _of_lora(take("method.use_rslora", to_bool)),
    "use_dora": _of_lora(take("method.use_dora", to_bool)),
    "pissa_init": _of_lora(_take_pissa),
    "pissa_iter": skip("pissa_init has it"),
    "pissa_convert": skip("slimtune export and repair fold the start into A and B"),
    "loraplus_lr_ratio": _of_lora(take("method.lr_ratio", float)),
    "quantization_bit": choose("model.quantization", {4: "nf4", 8: "int8"}),
    "quantization_method": expect(("bitsandbytes", "bnb"), "4 and 8 bits are bitsandbytes'", "bitsandbytes alone"),
    "quantization_type": expect(("nf4",), "4 bits are nf4", "4 bits are nf4"),
    "double_quantization": skip("scales of scales are slimtune's own choice"),
    "adapter_name_or_path": lack("give the adapter to train on: --init-adapter"),
    "dataset": _take_dataset,
    "eval_dataset": take("data.validation", lambda value: to_list(value)[0]),
    "dataset_dir": skip("data.train names the file"),
    "template": skip("the base's own chat template is used; data.chat_template names another"),
    "cutoff_len": take("data.max_seq_len", int),
    "train_on_prompt": lack("the loss is of the answers"),
    "mask_history": take("data.train_on", lambda value: "last_assistant" if to_bool(value) else "assistant"),
    "max_samples": lack("give a file with fewer rows"),
    "streaming": lack("rows are read once, and cached"),
    "mix_strategy": lack("one file is read"), "interleave_probs": lack("one file is read"),
    "val_size": lambda value, _: FieldOutcome("taken", {"data.validation_fraction": float(value)})
    if float(value) <= 0.5 else FieldOutcome("no-equivalent", reason="data.validation_fraction is a share"),
    "packing": take("train.packing", to_bool), "neat_packing": take("train.packing", to_bool),
    "pref_beta": _take_beta,
    "pref_loss": skip("stage has it"),
    "pref_ftx": lack("the pairs' loss has no cross-entropy beside it; task: orpo has"),
    "simpo_gamma": take("task.simpo_gamma", float),
    "disable_gradient_checkpointing": take("train.gradient_checkpointing", lambda value: not to_bool(value)),
    "pure_bf16": take_switch("model.dtype", "bfloat16"),
    "infer_dtype": skip("slimtune chat and export choose it"),
    "enable_thinking": skip("the chat template says it"),
    "tool_format": skip("the chat template says it"),
    "default_system": lack("write a system message into the rows"),
    "rope_scaling": lack("the base's config has it"),
    "resize_vocab": lack("the vocabulary stays the base's"), "add_tokens": lack("the vocabulary stays the base's"),
    "overwrite_cache": _CACHE, "cache_dir": _CACHE, "tokenized_path": _CACHE,
    "preprocessing_num_workers": _WORKERS, "preprocessing_batch_size": _WORKERS,
    "flash_attn": _KERNELS, "use_unsloth": _KERNELS, "enable_liger_kernel": _KERNELS, "shift_attn": lack("no LongLoRA"),
    "plot_loss": skip("`slimtune report` draws the loss"),
    "include_num_input_tokens_seen": skip("tokens are always counted"),
    **dict.fromkeys(("use_galore", "galore_layerwise", "galore_target", "galore_rank", "galore_scale", "use_apollo",
                     "use_badam", "use_adam_mini", "use_muon"), lack("train.optimizer is AdamW")),
    "freeze_vision_tower": skip("an adapter of text targets leaves it as it is"),
    "image_max_pixels": lack("rows are text alone"), "video_max_pixels": lack("rows are text alone"),
    "resume_lora_training": lack("give the adapter to train on: --init-adapter"),
    "checkpoint_dir": lack("give the adapter to train on: --init-adapter"),
    "ray_run_name": skip("no Ray"), "ray_num_workers": skip("no Ray"),
    "module_dropout": take("method.module_dropout", float), "oft_block_size": take("method.oft_block_size", int),
    "oft_rank": take("method.r", int), "oft_target": take("method.target_modules", to_targets),
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {
    "finetuning_type": "lora", "lora_rank": 8, "lora_alpha": lambda v: 2 * int(v.get("lora_rank") or 8),
    "lora_dropout": 0.0, "lora_target": "all", "cutoff_len": 2048, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8, "lr_scheduler_type": "linear",
    "warmup_ratio": lambda v: None if v.get("warmup_steps") else 0.0, "disable_gradient_checkpointing": False,
}  # fmt: skip
"""https://github.com/hiyouga/LLaMA-Factory/blob/main/src/llamafactory/hparams, and transformers' TrainingArguments."""


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields, with the files of dataset_info.json where it is beside the config."""
    folder = str(source.values.get("dataset_dir") or "data")
    for parent in (source.path.parent, *source.path.parent.parents[:3]):
        with suppress(OSError, ValueError):
            known = json.loads((parent / folder / "dataset_info.json").read_text(encoding="utf-8"))
            files = {name: str(parent / folder / entry["file_name"]) for name, entry in known.items()
                     if isinstance(entry, dict) and "file_name" in entry}  # fmt: skip
            hubs = {name: entry["hf_hub_url"] for name, entry in known.items()
                    if isinstance(entry, dict) and "hf_hub_url" in entry}  # fmt: skip
            return SourceFile(source.path, source.values, settings=_CUT, context={f"{NAME}:files": {**hubs, **files}})
    return SourceFile(source.path, source.values, settings=_CUT)
