"""A notebook's settings, by what PEFT and transformers' Trainer wrote: adapter_config.json and trainer_state.json.

training_args.bin is a pickle, which can run code when it is read: it is not. The rows are not in these files.
"""

from collections.abc import Mapping
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, lack, skip, take, to_bool
from .source_file import SourceFile
from .training_arguments import take_whole_steps

NAME = "unsloth"
MARKS = frozenset({"peft_type", "base_model_name_or_path", "r", "lora_alpha", "task_type", "inference_mode"})


def _take_base(value: Any, _: JsonObject) -> FieldOutcome:
    name = str(value)
    plain = name
    for end in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        plain = plain.removesuffix(end)
    settings = {"model.name": plain} | ({"model.quantization": "nf4"} if plain != name else {})
    return FieldOutcome("taken", settings, "in 4 bits" if plain != name else "")


def _take_method(value: Any, _: JsonObject) -> FieldOutcome:
    return FieldOutcome("taken", {"method.name": str(value).lower()})


def _take_rate(value: Any, _: JsonObject) -> FieldOutcome:
    rates = [entry["learning_rate"] for entry in value if isinstance(entry, dict) and entry.get("learning_rate")]
    if not rates:
        return FieldOutcome("not-needed", reason="it has no learning rates")
    return FieldOutcome("taken", {"train.learning_rate": float(max(rates))}, "the highest that was logged")


def _take_targets(value: Any, _: JsonObject) -> FieldOutcome:
    return FieldOutcome("taken", {"method.target_modules": value if isinstance(value, str) else sorted(value)})


def _take_if_on(path: str) -> Rule:
    """Return the rule of a setting that is taken if it has a value."""
    return lambda value, _: (
        FieldOutcome("taken", {path: value}) if value else FieldOutcome("not-needed", reason="it is off")
    )


RULES: dict[str, Rule] = {
    "base_model_name_or_path": _take_base, "peft_type": _take_method, "r": take("method.r", int),
    "lora_alpha": take("method.lora_alpha", float), "lora_dropout": take("method.lora_dropout", float),
    "target_modules": _take_targets, "modules_to_save": _take_if_on("method.modules_to_save"),
    "use_rslora": take("method.use_rslora", to_bool), "use_dora": take("method.use_dora", to_bool),
    "rank_pattern": _take_if_on("method.rank_pattern"), "alpha_pattern": _take_if_on("method.alpha_pattern"),
    "target_parameters": _take_if_on("method.target_parameters"), "bias": _take_if_on("method.bias"),
    "init_lora_weights": take("method.init_lora_weights"), "revision": take("model.revision", str),
    "exclude_modules": _take_if_on("method.exclude_modules"),
    "layers_to_transform": _take_if_on("method.layers_to_transform"),
    "layers_pattern": _take_if_on("method.layers_pattern"),
    "fan_in_fan_out": skip("the layer's class says it"), "task_type": skip("task says it"),
    "inference_mode": skip("a run trains"), "auto_mapping": skip("the base's config says it"),
    "peft_version": skip("it is of the file"), "megatron_config": lack("no Megatron"),
    "loftq_config": lack("init_lora_weights: loftq"), "eva_config": lack("init_lora_weights: eva"),
    "corda_config": lack("init_lora_weights: corda"), "lora_bias": _take_if_on("method.lora_bias"),
    "layer_replication": _take_if_on("method.layer_replication"), "qalora_group_size": skip("QALoRA is off"),
    "use_qalora": lack("no QALoRA"), "trainable_token_indices": _take_if_on("method.trainable_token_indices"),
    "alora_invocation_tokens": _take_if_on("method.alora_invocation_tokens"), "arrow_config": lack("no Arrow"),
    "ensure_weight_tying": _take_if_on("method.ensure_weight_tying"), "use_bdlora": lack("no BD-LoRA"),
    "lora_ga_config": lack("init_lora_weights: lora_ga"), "velora_config": lack("no VeLoRA"),
    "num_train_epochs": take("train.epochs", float), "train_batch_size": take("train.batch_size", int),
    "max_steps": skip("num_train_epochs and the rows give it"),
    "logging_steps": take_whole_steps("train.logging_steps"),
    "eval_steps": take_whole_steps("train.eval_steps"), "save_steps": take_whole_steps("train.save_steps"),
    "log_history": _take_rate,
    **dict.fromkeys((
        "global_step", "epoch", "best_metric", "best_global_step", "best_model_checkpoint", "total_flos",
        "stateful_callbacks", "trial_name", "trial_params", "is_world_process_zero", "is_local_process_zero",
        "is_hyper_param_search", "num_input_tokens_seen",
    ), skip("it is a result of the run")),
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {}


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields; the rows are to be named."""
    return SourceFile(source.path, source.values, settings={"data.train": "rows.jsonl"}, not_in_file=("data.train",))
