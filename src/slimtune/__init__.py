"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are sorted and lazy: `import slimtune` and `slimtune --help` import no torch.
"""

import importlib
from typing import Any

from .adapters.registry import config_class_paths

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    "AutoPeftModel": "adapters.auto",
    "AutoPeftModelForCausalLM": "adapters.auto",
    "AutoPeftModelForFeatureExtraction": "adapters.auto",
    "AutoPeftModelForQuestionAnswering": "adapters.auto",
    "AutoPeftModelForSeq2SeqLM": "adapters.auto",
    "AutoPeftModelForSequenceClassification": "adapters.auto",
    "AutoPeftModelForTokenClassification": "adapters.auto",
    "EvaConfig": "methods.lora.eva",
    "PromptEncoderReparameterizationType": "methods.p_tuning",
    "PromptTuningInit": "methods.prompt_tuning",
    "PeftConfig": "adapters.config",
    "PeftModel": "adapters.model",
    "TaskType": "adapters.config",
    "convert_to_lora": "adapters.conversion",
    "create_loraplus_optimizer": "adapters.optimizer",
    "get_eva_state_dict": "methods.lora.eva",
    "get_peft_model": "adapters.model",
    "get_peft_model_state_dict": "adapters.state_dict",
    "hotswap_adapter": "adapters.hotswap",
    "initialize_kv_prefix_from_past_key_values": "methods.prefix_tuning",
    "initialize_kv_prefix_from_text": "methods.prefix_tuning",
    "initialize_lora_eva_weights": "methods.lora.eva",
    "load_run": "setup",
    "parameter_groups": "adapters.optimizer",
    "prepare_model_for_compiled_hotswap": "adapters.hotswap",
    "prepare_model_for_kbit_training": "adapters.quantized",
    "replace_lora_weights_loftq": "methods.lora.loftq",
    "save_as_lora": "adapters.conversion",
    "set_peft_model_state_dict": "adapters.state_dict",
}

_HOME |= config_class_paths()  # a method's file is its own entry

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"slimtune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
