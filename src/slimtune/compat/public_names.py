"""PEFT's names and the modules that its users import them from.

`slimtune.X` is a name of `PUBLIC`. `slimtune.tuners.lora.layer`, `slimtune.utils.other` and PEFT's other paths are
modules without a file: each one gives every name of `PUBLIC` and `INNER`, because PEFT moves names between its modules
from release to release. All names are lazy: nothing here imports torch.
"""

import difflib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from ..core.adapters.method_registry import METHODS, get_method_config_class
from ..errors import suggest

PUBLIC = {
    "compat.auto_models": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    ),
    "core.adapters.peft_config": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "extras.lora_conversion": ("convert_to_lora", "save_as_lora"),
    "extras.accepted_changes": ("accept_changes",),
    "extras.hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "core.adapters.peft_model": ("PeftModel", "find_modules_without_gradient", "get_peft_model"),
    "compat.model_names": (
        "PeftMixedModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    ),
    "extras.lora_optimizers": ("create_loraplus_optimizer",),
    "extras.prompt_learning.prompt_config": ("PromptLearningConfig",),
    "compat.kbit_training": ("prepare_model_for_kbit_training",),
    "core.adapters.adapter_tensors": ("get_peft_model_state_dict",),
    "compat.state_dicts": (
        "get_base_model_state_dict", "load_peft_weights", "set_base_model_state_dict", "set_peft_model_state_dict",
    ),
    "compat.adapter_status": ("get_layer_status", "get_model_status"),
    "compat.tuner_models": (
        "inject_adapter_in_model",
    ),
    "errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
    "compat.helpers": ("find_kappa_target_modules",),
    "compat.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "bloom_model_postprocess_past_key_value",
    ),
    "methods.lora": ("LoraRuntimeConfig",),
    "methods.lora.eva": ("EvaConfig", "get_eva_state_dict", "initialize_lora_eva_weights"),
    "methods.lora.loraga": ("LoraGAConfig", "preprocess_loraga"),
    "methods.lora.loftq": ("LoftQConfig", "replace_lora_weights_loftq"),
    "methods.p_tuning.p_tuning_config": ("PromptEncoderReparameterizationType",),
    "methods.p_tuning.p_tuning_modules": ("PromptEncoder",),
    "methods.prefix_tuning.prefix_tuning_modules": (
        "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
    ),
    "methods.prompt_tuning.prompt_tuning_config": ("PromptTuningInit",),
    "core.training.optimizer": ("parameter_groups",),
    "core.training.trained_model": ("load_run",),
    "compat.utility_functions": ("cast_mixed_precision_params", "shift_tokens_right"),
}  # fmt: skip
INNER = {
    "core.adapters.peft_config": ("_get_commit_hash",),
    "extras.lora_optimizers": ("create_lorafa_optimizer",),
    "compat.tuner_layers": (
        "AuxiliaryTrainingWrapper", "BaseTunerLayer", "Bnb4bitBackend", "Bnb8bitBackend", "BufferDict", "LycorisLayer",
        "ModulesToSaveWrapper", "ParamWrapper", "TrainableTokensWrapper",
    ),
    "compat.adapter_status": ("TunerLayerStatus", "TunerModelStatus"),
    "compat.target_functions": (
        "_find_minimal_target_modules", "_get_module_names_tied_with_embedding", "_maybe_include_all_linear_layers",
        "check_target_module_exists", "inspect_matched_modules",
    ),
    "compat.tuner_models": ("BaseTuner", "MixedModel", "delete_adapter", "set_adapter", "set_requires_grad"),
    "compat.mapping": (
        "CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "PEFT_TYPE_TO_PREFIX_MAPPING", "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    ),
    "compat.helpers": (
        "KappaTuneSelector", "check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale",
        "update_forward_signature", "update_generate_signature", "update_signature",
    ),
    "compat.import_utils": (
        "is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available", "is_eetq_available",
        "is_gptqmodel_available", "is_hqq_available", "is_optimum_available", "is_te_available", "is_torchao_available",
        "is_torchao_ge_v0_18_0", "is_transformers_ge_v5", "is_transformers_ge_v5_1_0", "is_transformers_ge_v5_4_0",
        "is_transformers_ge_v5_6_0", "is_transformers_ge_v5_13_0", "is_transformers_ge_v5_17_0", "is_xpu_available",
    ),
    "methods.lora.alora": (
        "calculate_alora_offsets", "get_alora_offsets_for_forward", "get_alora_offsets_for_generate",
    ),
    "methods.lora.corda": ("CordaConfig", "preprocess_corda"),
    "methods.lora.dora": ("DoraCaching",),
    "methods.lora.intruders": ("reduce_intruder_dimension",),
    "compat.utility_functions": (
        "DUMMY_MODEL_CONFIG", "MIN_TARGET_MODULES_FOR_OPTIMIZATION", "WEIGHTS_NAME",
        "_get_submodules", "id_tensor_storage", "infer_device", "init_empty_weights", "skip_init_on_device",
        "transpose",
    ),
}  # fmt: skip
HOMES = {name: home for table in (PUBLIC, INNER) for home, names in table.items() for name in names}
_LAYER_TYPES = ("Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "Linear4bit", "Linear8bitLt", "MultiheadAttention")
_TUNER_PARTS = (
    "bnb", "config", "conversion", "corda", "dora", "eva", "intruders", "layer", "loraga", "model", "variants",
)  # fmt: skip
MODULES = {
    "auto", "config", "functional", "helpers", "import_utils", "mapping", "mapping_func", "mixed_model", "optimizers",
    "optimizers.lorafa", "optimizers.loraplus", "peft_model", "tuners", "tuners._buffer_dict", "tuners.lycoris_utils",
    "tuners.mixed", "tuners.tuners_utils", "utils", "utils.constants", "utils.error",
    "utils.hotswap", "utils.integrations", "utils.loftq_utils", "utils.merge_utils",
    "utils.other", "utils.peft_types", "utils.quantization_utils", "utils.save_and_load", "utils.warning",
}  # fmt: skip
"""PEFT's modules, without those of its methods. None has a file under its name here."""


@cache
def map_peft_class_prefixes_by_method() -> dict[str, str]:
    """Return how PEFT's class names begin for each built-in method that PEFT has and that changes layers: "Lora"."""
    classes = map(get_method_config_class, METHODS.built_in_names())
    peft_classes = [cls for cls in classes if cls.exists_in_peft and not cls.is_prompt_learning]
    return {cls.name: cls.__name__.removesuffix("Config") for cls in peft_classes}


@cache
def map_method_names_to_modules() -> dict[str, str]:
    """Return the module of each name that follows from a built-in method; the configs' modules import no torch.

    These are `LoraConfig`, and for PEFT's methods `LoraModel`, `LoraLayer` and `TRANSFORMERS_MODELS_TO_LORA_…`.
    """
    homes = {get_method_config_class(name).__name__: f"methods.{name}" for name in METHODS.built_in_names()}
    for method, stem in map_peft_class_prefixes_by_method().items():
        config = get_method_config_class(method)
        homes[f"{stem}Model"] = "compat.tuner_models"
        if not config.is_adaption_prompt:  # it belongs to no layer
            homes[f"{stem}Layer"] = "compat.tuner_layers"
            homes[format_targets_name(method)] = "compat.mapping"
    return homes


def format_targets_name(method: str) -> str:
    """Return PEFT's name for the default targets of a method by `model_type`."""
    return f"TRANSFORMERS_MODELS_TO_{method.upper().replace('_', '')}_TARGET_MODULES_MAPPING"


def find_module_of_peft_name(name: str) -> str | None:
    """Return the module that one of PEFT's names is in, None if there is no such name."""
    from_method = name.endswith(("Config", "Model", "Layer", "_TARGET_MODULES_MAPPING"))
    return HOMES.get(name) or (map_method_names_to_modules().get(name) if from_method else None)


def is_peft_module(path: str) -> bool:
    """Return whether PEFT has a module: one of `MODULES`, or `tuners.lora` and `tuners.lora.layer` of a method."""
    folder, method, *part = (*path.split("."), "")
    if folder != "tuners" or path in MODULES or method not in METHODS.built_in_names():
        return path in MODULES
    return get_method_config_class(method).exists_in_peft and part in ([""], *([p, ""] for p in _TUNER_PARTS))


def list_public_names() -> list[str]:
    """Return the names of `slimtune` itself, sorted."""
    from_methods = {name for name in map_method_names_to_modules() if name.endswith(("Config", "Model"))}
    return sorted({name for names in PUBLIC.values() for name in names} | from_methods)


def import_public_name(module: str, name: str) -> Any:
    """Return `slimtune.a.b.name`, where `module` is `slimtune.a.b`.

    Raises:
        AttributeError: there is no such name; it gives the nearest one.
    """
    package = __name__.partition(".")[0]
    inner = module.removeprefix(package).lstrip(".")
    path = f"{inner}.{name}".lstrip(".")
    if is_peft_module(path):
        return importlib.import_module(f"{package}.{path}")
    tuner = inner.split(".")[1:2]
    if inner.startswith("tuners.") and name in _LAYER_TYPES:
        return importlib.import_module(f"{package}.compat.mapping").find_peft_layer_class(tuner[0], name)
    home = find_module_of_peft_name(name)
    if home is None or home == inner:
        names = [*HOMES, *map_method_names_to_modules()] if name[:1] != "_" else []
        raise AttributeError(f"module {module!r} has no attribute {name!r}{suggest_public_name(name, names)}")
    return getattr(importlib.import_module(f"{package}.{home}"), name)


def suggest_public_name(name: str, names: Collection[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest name, for a config that slimtune lacks the method, or ""."""
    stem = name.removesuffix("Config")
    if stem == name:
        return suggest(name, names)
    # What every config's name ends with makes none of them near.
    stems = {n.removesuffix("Config").lower(): n for n in names if n.endswith("Config")}
    near = difflib.get_close_matches(stem.lower(), stems, n=1)
    if near:
        return f"; did you mean {stems[near[0]]!r}?"
    return "; slimtune lacks this method: `slimtune methods` lists those it has"


def make_module_getattr(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that gives PEFT's names."""
    return lambda name: import_public_name(module, name)


class _NamesModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return import_public_name(self.__name__, name)

    def __dir__(self) -> list[str]:
        return sorted({*HOMES, *map_method_names_to_modules()})


class _ModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, inner = fullname.partition(".")
        if package != __name__.partition(".")[0]:
            return None
        if is_peft_module(inner):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        parent, _, name = inner.rpartition(".")
        if (not parent or is_peft_module(parent)) and name[0] != "_":
            # `from slimtune import LoraConfi` comes here last; otherwise Python's message would lack the nearest name.
            names = [
                *HOMES,
                *map_method_names_to_modules(),
                *(METHODS.built_in_names() if parent == "tuners" else ()),
                *(m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == parent),
            ]
            where = f"{package}.{parent}".rstrip(".")
            raise ImportError(
                f"cannot import name {name!r} from {where!r}{suggest_public_name(name, names)}", name=fullname
            )
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _NamesModule(spec.name, "PEFT's names, under the path of one of PEFT's modules.")

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_ModuleFinder())  # last: a module with a file is imported from it
