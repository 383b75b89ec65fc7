"""Which base is this? A short hash of what a transformers config says about the shape and arithmetic of the model.

Only facts that an adapter depends on are hashed, under one name each, whatever the architecture calls them
(`n_embd`, `d_model` and `hidden_size` are one fact). How the base is run or stored (dtype, attention kernel, cache,
quantization, path, library version) says nothing about which base it is and is left out, so the fingerprint survives
a newer transformers, a GGUF round trip and an NF4 load.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .json_results import JsonObject

FACTS = {
    "model_type": "model_type",
    "hidden": "hidden_size d_model n_embd dim hidden_dim",
    "layers": "num_hidden_layers n_layer n_layers num_layers",
    "decoder_layers": "num_decoder_layers decoder_layers",
    "heads": "num_attention_heads n_head n_heads num_heads",
    "kv_heads": "num_key_value_heads num_kv_heads n_head_kv",
    "head_dim": "head_dim d_kv kv_channels",
    "intermediate": "intermediate_size n_inner d_ff ffn_dim ffn_hidden_size",
    "vocab": "vocab_size",
    "activation": "hidden_act activation_function hidden_activation feed_forward_proj",
    "tied": "tie_word_embeddings",
    "experts": "num_experts num_local_experts n_routed_experts",
    "experts_per_token": "num_experts_per_tok top_k_experts",
    "expert_intermediate": "moe_intermediate_size expert_ffn_hidden_size",
    "sliding_window": "sliding_window",
    "layer_types": "layer_types",
}
"""The names that architectures give to each fact; the first one that a config has counts."""


def config_fingerprint(config: Any) -> str:
    """Return 16 hex digits that name the base of a transformers config (anything with `to_dict()`, or a dictionary)."""
    facts = get_hashed_config_facts(config if isinstance(config, Mapping) else config.to_dict())
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def get_hashed_config_facts(config: Mapping[str, Any]) -> JsonObject:
    """Return the hashed facts of a config's dictionary under their common names."""
    facts: dict[str, Any] = {}
    for fact, names in FACTS.items():
        value = next((config[n] for n in names.split() if config.get(n) is not None), None)
        if value is not None:
            facts[fact] = normalize_config_numbers(value)
    # Spelled out by some configs and left to the default by others: the same model either way.
    if isinstance(facts.get("heads"), int):
        facts.setdefault("kv_heads", facts["heads"])
        if isinstance(facts.get("hidden"), int) and facts["heads"]:
            facts.setdefault("head_dim", facts["hidden"] // facts["heads"])
    if rope := get_rope_settings(config):
        facts["rope"] = rope
    for name, inner in config.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(inner, Mapping):
            facts[name] = get_hashed_config_facts(inner)
    return facts


def get_rope_settings(config: Mapping[str, Any]) -> JsonObject:
    """Return the rotary settings, transformers 4's (`rope_theta` beside `rope_scaling`) spelled as 5's."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if settings and all(isinstance(v, Mapping) for v in settings.values()):  # one set per kind of layer
        return normalize_config_numbers(settings)
    if config.get("rope_theta") is not None:
        settings.setdefault("rope_theta", config["rope_theta"])
    if settings:
        settings.setdefault("rope_type", settings.get("type", "default"))
    return normalize_config_numbers({k: v for k, v in settings.items() if v is not None and k != "type"})


def normalize_config_numbers(value: Any) -> Any:
    """Return `value` so that 10000, 10000.0 and a float read back from float32 hash alike."""
    if isinstance(value, Mapping):
        return {str(k): normalize_config_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [normalize_config_numbers(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.6g}"
    return value
