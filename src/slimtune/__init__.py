"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are sorted and lazy: `import slimtune` and `slimtune --help` import no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from .contract.registry import config_names

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    "AutoPeftModel": "adapt.auto",
    "AutoPeftModelForCausalLM": "adapt.auto",
    "AutoPeftModelForFeatureExtraction": "adapt.auto",
    "AutoPeftModelForQuestionAnswering": "adapt.auto",
    "AutoPeftModelForSeq2SeqLM": "adapt.auto",
    "AutoPeftModelForSequenceClassification": "adapt.auto",
    "AutoPeftModelForTokenClassification": "adapt.auto",
    "EvaConfig": "methods.lora.eva",
    "PromptEncoderReparameterizationType": "methods.p_tuning",
    "PromptTuningInit": "methods.prompt_tuning",
    "PeftConfig": "contract.config",
    "PeftModel": "adapt.model",
    "TaskType": "contract.config",
    "convert_to_lora": "adapt.combine",
    "create_loraplus_optimizer": "adapt.rates",
    "get_eva_state_dict": "methods.lora.eva",
    "get_peft_model": "adapt.model",
    "get_peft_model_state_dict": "adapt.checkpoint",
    "hotswap_adapter": "adapt.hotswap",
    "initialize_kv_prefix_from_past_key_values": "methods.prefix_tuning.from_text",
    "initialize_kv_prefix_from_text": "methods.prefix_tuning.from_text",
    "initialize_lora_eva_weights": "methods.lora.eva",
    "load_run": "build",
    "parameter_groups": "adapt.rates",
    "prepare_model_for_compiled_hotswap": "adapt.hotswap",
    "prepare_model_for_kbit_training": "adapt.quantized",
    "replace_lora_weights_loftq": "methods.lora.loftq",
    "save_as_lora": "adapt.combine",
    "set_peft_model_state_dict": "adapt.checkpoint",
}

_HOME |= config_names()  # a method's file is its own entry

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"slimtune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
