"""How mlx-lm names the modules of a language model, its adapters' tensors, and the rotary settings of a config.

Module names are transformers', but for models that also see images, whose text part comes first in mlx-lm's names:

    transformers    model.language_model.layers.0.self_attn.q_proj
    mlx-lm          language_model.model.layers.0.self_attn.q_proj

A LoRA multiplies x A B there, so A `(in, r)` and B `(r, out)` are the transposes of PEFT's, and its update is `scale`
times that, where PEFT has alpha / r. One rank and one scale hold for all modules. Rows of an embedding are A's.
"""

import re
from typing import Any

from ..core.foundation.json_results import JsonObject

ADAPTER_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
_HARMLESS = ("torch_dtype", "text_config", "vocab_size")
"""Fields that are added, and without which mlx-lm computes the same."""
_LAYER = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.(?P<key>.+)")


def to_mlx_module_name(module: str, is_wrapper: bool) -> str | None:
    """Return mlx-lm's name of a module of transformers; None for a part that sees images, which mlx-lm leaves out.

    `is_wrapper` says whether the model has a text model inside.
    """
    if not is_wrapper:
        return module
    if module.startswith("model.language_model."):
        return "language_model.model." + module.removeprefix("model.language_model.")
    return "language_model.lm_head" if module == "lm_head" else None


def to_transformers_module_name(module: str) -> str:
    """Return transformers' name of a module of mlx-lm."""
    if module.startswith("language_model.model."):
        return "model.language_model." + module.removeprefix("language_model.model.")
    return module.removeprefix("language_model.")


def select_layers_and_keys(modules: list[str], layer_count: int) -> tuple[int, list[str]]:
    """Return mlx-lm's `num_layers` and `keys` that adapt exactly these modules, by mlx-lm's names.

    mlx-lm adapts the `num_layers` last layers, each at the `keys` that are relative to a layer, and any module whose
    whole name is a key. So keys are whole names if the layers are not the last ones, or are adapted differently.
    """
    keys_by_layer: dict[int, list[str]] = {}
    elsewhere = []
    for module in modules:
        if match := _LAYER.fullmatch(module):
            keys_by_layer.setdefault(int(match["index"]), []).append(match["key"])
        else:
            elsewhere.append(module)
    count = len(keys_by_layer)
    same = len({frozenset(keys) for keys in keys_by_layer.values()}) == 1
    if same and sorted(keys_by_layer) == list(range(layer_count - count, layer_count)):
        return count, [*next(iter(keys_by_layer.values())), *elsewhere]
    return layer_count, list(modules)


def add_fields_mlx_lm_reads(config: JsonObject) -> JsonObject:
    """Return the fields of a config.json with the older names of what transformers 5 renamed.

    Most of mlx-lm's classes read `rope_theta` and `rope_scaling`, and take their default, often 10,000, where the file
    has only `rope_parameters`: the model loads, and computes something else.
    """
    fields = dict(config)
    if isinstance(text := config.get("text_config"), dict):
        fields["text_config"] = add_fields_mlx_lm_reads(text)
        if text.get("vocab_size"):  # mlx-lm's class of Gemma 3 has a number of its own otherwise
            fields.setdefault("vocab_size", text["vocab_size"])
    if "torch_dtype" not in config and (dtype := config.get("dtype")):
        fields["torch_dtype"] = dtype
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return fields
    by_layer_type = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if by_layer_type:
        if sliding := by_layer_type.get("sliding_attention"):
            fields.setdefault("rope_local_base_freq", sliding.get("rope_theta"))
        parameters = by_layer_type.get("full_attention", {})
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if name in parameters and config.get(name) is None:
            fields[name] = parameters[name]
    if (kind := parameters.get("rope_type", "default")) != "default" and config.get("rope_scaling") is None:
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        fields["rope_scaling"] = {**scaling, "type": kind, "rope_type": kind}
    if (period := _find_layer_period(config.get("layer_types"))) and config.get("sliding_window_pattern") is None:
        fields["sliding_window_pattern"] = period
    return fields


def add_older_rope_fields(config: JsonObject) -> JsonObject:
    """Return the fields of a config.json with `rope_theta` and `rope_scaling`, which transformers 4 and mlx-lm read.

    Without them they take a default, often 10,000: the model loads, and computes something else. Rotary embeddings that
    differ by the kind of layer have no such fields.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        return config
    older = add_fields_mlx_lm_reads(config)
    return config | {name: older[name] for name in ("rope_theta", "rope_scaling") if name in older}


def is_misread_by_mlx_lm(config: JsonObject) -> bool:
    """Return whether mlx-lm could take another rotary setting than a config.json means."""
    added = add_fields_mlx_lm_reads(config)
    text = config.get("text_config")
    if isinstance(text, dict) and is_misread_by_mlx_lm(text):
        return True
    return any(added[name] != config.get(name) for name in added if name not in _HARMLESS)


def _find_layer_period(layer_types: Any) -> int | None:
    """Return p if every p-th layer has full attention and all others a sliding window; None: no such pattern."""
    if not isinstance(layer_types, list) or "sliding_attention" not in layer_types:
        return None
    full = [i + 1 for i, kind in enumerate(layer_types) if kind == "full_attention"]
    period = full[0] if full else len(layer_types) + 1
    expected = [i for i in range(1, len(layer_types) + 1) if i % period == 0]
    return period if full == expected else None
