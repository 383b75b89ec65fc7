"""Arguments of TRL's scripts, in a command line or the YAML of `trl sft --config`."""

from collections.abc import Mapping
from typing import Any

from ...core.foundation.json_results import JsonObject
from .field_rules import FieldOutcome, Rule, choose, lack, refuse, skip, take, to_bool, to_list, to_targets
from .source_file import SourceFile
from .training_arguments import DTYPES, TRAINING_ARGUMENTS, take_switch

NAME = "trl"
MARKS = frozenset({
    "model_name_or_path", "dataset_name", "use_peft", "dataset_train_split", "lora_r", "dataset_text_field",
    "dataset_config", "max_seq_length",
})  # fmt: skip
_TASKS = {"": "sft", "sft": "sft", "dpo": "dpo", "kto": "kto", "orpo": "orpo", "reward": "reward",
          "reward_modeling": "reward"}  # fmt: skip


def _take_loss(value: Any, _: JsonObject) -> FieldOutcome:
    names = to_list(value)
    if len(names) == 1 and names[0] in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "kto",
                                        "apo_zero_unpaired"):  # fmt: skip
        return FieldOutcome("taken", {"task.loss_type": names[0]})
    if names == ["nll"]:
        return FieldOutcome("not-needed", reason="it is the cross-entropy of sft")
    return FieldOutcome("no-equivalent", reason="task.loss_type has no such loss")


def _of_peft(rule: Rule) -> Rule:
    """Return a rule that counts with use_peft alone."""

    def apply(value: Any, values: JsonObject) -> FieldOutcome:
        if to_bool(values.get("use_peft") or False):
            return rule(value, values)
        return FieldOutcome("not-needed", reason="without use_peft all weights are trained")

    return apply


_SPLITS = skip("data.train and data.validation name files, or datasets with their splits")
_OTHERS = lack("the loss is of the answers")
RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": take("model.name", str), "model_name": take("model.name", str),
    "model_revision": take("model.revision", str),
    "dtype": choose("model.dtype", DTYPES), "torch_dtype": choose("model.dtype", DTYPES),
    "load_in_4bit": take_switch("model.quantization", "nf4"), "load_in_8bit": take_switch("model.quantization", "int8"),
    "bnb_4bit_quant_type": skip("4 bits are nf4"), "use_bnb_nested_quant": skip("scales of scales are ours to choose"),
    "use_peft": skip("method says it"),
    "lora_r": _of_peft(take("method.r", int)), "lora_alpha": _of_peft(take("method.lora_alpha", float)),
    "lora_dropout": _of_peft(take("method.lora_dropout", float)),
    "lora_target_modules": _of_peft(take("method.target_modules", to_targets)),
    "lora_target_parameters": _of_peft(take("method.target_parameters", to_list)),
    "lora_modules_to_save": _of_peft(take("method.modules_to_save", to_list)),
    "lora_task_type": skip("task says it"), "use_rslora": _of_peft(take("method.use_rslora", to_bool)),
    "use_dora": _of_peft(take("method.use_dora", to_bool)),
    "dataset_name": take("data.train", str), "dataset_config": lack("give the rows as a file"),
    "dataset_train_split": _SPLITS, "dataset_test_split": _SPLITS, "dataset_streaming": _SPLITS,
    "dataset_text_field": lambda value, _: FieldOutcome("taken", {"data.columns": {"text": value}})
    if value != "text" else FieldOutcome("not-needed", reason="text is its name here, too"),
    "datasets": lack("one dataset is read"),
    "max_length": take("data.max_seq_len", int), "max_seq_length": take("data.max_seq_len", int),
    "max_prompt_length": skip("rows are cut as a whole"), "truncation_mode": skip("rows are cut at their end"),
    "packing": take("train.packing", to_bool), "eval_packing": skip("evaluation packs, too"),
    "padding_free": skip("rows are packed"), "packing_strategy": skip("rows are packed whole"),
    "assistant_only_loss": skip("it is what slimtune does"), "completion_only_loss": skip("it is what slimtune does"),
    "eos_token": lack("the chat template says where an answer ends"), "pad_token": skip("packed rows need none"),
    "chat_template_path": take("data.chat_template", str),
    "beta": take("task.beta", float), "loss_type": _take_loss, "label_smoothing": take("task.label_smoothing", float),
    "desirable_weight": take("task.desirable_weight", float),
    "undesirable_weight": take("task.undesirable_weight", float),
    "center_rewards_coefficient": take("task.center_rewards_coefficient", float),
    "precompute_ref_log_probs": skip("the reference is the base, in the same pass"),
    "no_remove_unused_columns": skip("columns that are not read are left out"),
    "optimize_cuda_cache": skip("memory is slimtune's own choice"), "env": lack("set variables in the shell"),
    "activation_offloading": take("train.offload_activations", to_bool), "config": lack("give the YAML itself"),
}  # fmt: skip
_LEARNING_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "reward": 1e-4}
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": lambda v: _LEARNING_RATES[v.get("trl:task", "sft")], "max_length": lambda v: None
    if v.get("max_seq_length") else 1024,
    "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "lr_scheduler_type": "linear",
    "warmup_ratio": lambda v: None if v.get("warmup_steps") else 0.0, "gradient_checkpointing": True,
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
}  # fmt: skip
"""TRL 1.16's SFTConfig, DPOConfig, KTOConfig, RewardConfig and ModelConfig; a test compares them with the package."""


def prepare(source: SourceFile) -> SourceFile:
    """Return the fields, with the task of the script: a YAML does not name it, and is for `trl sft`."""
    if source.command not in _TASKS:
        raise refuse("the script", source.command, f"one of {', '.join(filter(None, _TASKS))}")
    task = _TASKS[source.command]
    method = "lora" if to_bool(source.values.get("use_peft") or False) else "full"
    context = {"trl:task": task}
    settings = {"task.name": task, "method.name": method, "data.on_overlong": "truncate"}
    return SourceFile(source.path, source.values, source.program, source.command, settings, context)
