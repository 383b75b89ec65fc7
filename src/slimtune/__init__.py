"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are sorted and lazy: `import slimtune` and `slimtune --help` import no torch.
"""

import importlib
from typing import Any

from .adapters.registry import config_class_paths

__version__ = "0.2.0.dev0"

_NAMES_BY_MODULE = {
    "adapters.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "adapters.config": ("PeftConfig", "TaskType"),
    "adapters.conversion": ("convert_to_lora", "save_as_lora"),
    "adapters.hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "adapters.model": ("PeftModel", "get_peft_model"),
    "adapters.optimizer": ("create_loraplus_optimizer", "parameter_groups"),
    "adapters.quantized": ("prepare_model_for_kbit_training",),
    "adapters.state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "methods.lora.eva": ("EvaConfig", "get_eva_state_dict", "initialize_lora_eva_weights"),
    "methods.lora.loftq": ("replace_lora_weights_loftq",),
    "methods.p_tuning": ("PromptEncoderReparameterizationType",),
    "methods.prefix_tuning": ("initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text"),
    "methods.prompt_tuning": ("PromptTuningInit",),
    "setup": ("load_run",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}
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
