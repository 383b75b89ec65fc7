"""ms-swift's arguments, in YAML, JSON or a command line: https://github.com/modelscope/ms-swift/tree/main/examples."""

import math
from collections.abc import Mapping
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, choose, expect, lack, refuse, skip, take, to_bool, to_list, to_targets
from .source_file import SourceFile
from .training_arguments import DTYPES, TRAINING_ARGUMENTS

NAME = "ms-swift"
MARKS = frozenset({
    "train_type", "tuner_type", "rlhf_type", "split_dataset_ratio", "quant_bits", "model_author", "lora_rank", "model",
    "max_length", "torch_dtype",
})  # fmt: skip
_TASKS = {"dpo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "rm": "reward"}


def _take_method(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in ("lora", "full", "adalora", "vera"):
        raise refuse("train_type", value, "lora, full, adalora or vera")
    return FieldOutcome("taken", {"method.name": value})


def _take_dataset(value: Any, _: JsonObject) -> FieldOutcome:
    first, *others = map(str, to_list(value))
    name, _hash, count = first.partition("#")
    reasons = [f"all of its rows, not {count}"] if count else []
    reasons += [f"one dataset is read: without {', '.join(others)}"] if others else []
    return FieldOutcome("taken", {"data.train": name}, "; ".join(reasons))


def _take_task(value: Any, _: JsonObject) -> FieldOutcome:
    if value not in _TASKS:
        raise refuse("rlhf_type", value, f"one of {', '.join(_TASKS)}")
    return FieldOutcome("taken", {"task.name": _TASKS[value]})


def _take_start(value: Any, _: JsonObject) -> FieldOutcome:
    if str(value).lower() in ("true", "gaussian", "pissa", "olora") or str(value).startswith("pissa_niter"):
        return FieldOutcome("taken", {"method.init_lora_weights": True if str(value).lower() == "true" else value})
    return FieldOutcome("no-equivalent", reason="method.init_lora_weights has no such start")


_TRACKER = lack("the tracker's own variables name it")
_PERSONA = skip("it is for a dataset of ms-swift's own, whose rows name a model")
RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model": take("model.name", str), "model_id_or_path": take("model.name", str),
    "model_revision": take("model.revision", str),
    "train_type": _take_method, "tuner_type": _take_method, "rlhf_type": _take_task,
    "torch_dtype": choose("model.dtype", DTYPES), "dtype": choose("model.dtype", DTYPES),
    "quant_bits": choose("model.quantization", {4: "nf4", 8: "int8"}),
    "quant_method": expect(("bnb",), "4 and 8 bits are bitsandbytes'", "bitsandbytes alone"),
    "bnb_4bit_compute_dtype": skip("model.dtype is what layers compute in"),
    "bnb_4bit_use_double_quant": skip("scales of scales are slimtune's own choice"),
    "bnb_4bit_quant_type": expect(("nf4",), "4 bits are nf4", "4 bits are nf4"),
    "lora_rank": take("method.r", int), "lora_alpha": take("method.lora_alpha", float),
    "lora_dropout": take("method.lora_dropout", float), "target_modules": take("method.target_modules", to_targets),
    "modules_to_save": take("method.modules_to_save", to_list),
    "use_rslora": take("method.use_rslora", to_bool), "use_dora": take("method.use_dora", to_bool),
    "init_weights": _take_start, "init_lora_weights": _take_start,
    "lorap_lr_ratio": take("method.lr_ratio", float),
    "freeze_vit": skip("an adapter of text targets leaves it as it is"),
    "freeze_aligner": skip("an adapter of text targets leaves it as it is"),
    "adapters": lack("give the adapter to train on: --init-adapter"),
    "dataset": _take_dataset, "val_dataset": take("data.validation", lambda v: str(to_list(v)[0]).partition("#")[0]),
    "split_dataset_ratio": take("data.validation_fraction", float),
    "max_length": take("data.max_seq_len", int),
    "truncation_strategy": choose("data.on_overlong", {"delete": "drop", "left": "truncate", "right": "truncate",
                                                       "raise": "error"}),
    "agent_template": skip("the chat template says it"),
    "swanlab_project": _TRACKER, "swanlab_token": _TRACKER, "swanlab_exp_name": _TRACKER, "swanlab_mode": _TRACKER,
    "template": skip("the base's own chat template is used; data.chat_template names another"),
    "system": lack("write a system message into the rows"), "loss_scale": lack("the loss is of the answers"),
    "packing": take("train.packing", to_bool), "padding_free": skip("rows are packed"),
    "streaming": lack("rows are read once, and cached"), "dataset_shuffle": skip("rows are shuffled"),
    "beta": take("task.beta", float), "rpo_alpha": lack("the pairs' loss has no cross-entropy beside it"),
    "early_stop_interval": take("train.early_stopping_patience", int),
    "optimizer": lack("train.optimizer is AdamW"), "use_hf": skip("the Hub is Hugging Face's"),
    "model_author": _PERSONA, "model_name": _PERSONA, "model_type": skip("the base's config says it"),
    "load_from_cache_file": skip("tokenized rows are cached by their content"),
    "columns": take("data.columns"), "add_version": skip("a run folder is new"),
    "custom_register_path": lack("its rows and models are Python code"),
    "create_checkpoint_symlink": skip("a run folder has its adapter at one place"),
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {
    "tuner_type": lambda v: None if v.get("train_type") else "lora",
    "learning_rate": lambda v: 1e-5 if "full" in (v.get("train_type"), v.get("tuner_type")) else 1e-4,
    "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear", "num_train_epochs": 3.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": lambda v: math.ceil(16 / int(v.get("per_device_train_batch_size") or 1)),
    "lr_scheduler_type": "cosine", "weight_decay": 0.1, "gradient_checkpointing": True,
}  # fmt: skip
"""https://swift.readthedocs.io/en/latest/Instruction/Command-line-parameters.html."""


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields; those of LoRA do not count where all weights are trained."""
    if "full" not in (source.values.get("train_type"), source.values.get("tuner_type")):
        return source
    of_lora = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
    return SourceFile(source.path, source.values, source.program, source.command, without_defaults=frozenset(of_lora))
