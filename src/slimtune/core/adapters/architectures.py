"""Model architectures: default target modules, heads of new tasks, names of the two sub-layers of a layer.

The default targets are PEFT's, except for gemma4, for which PEFT has a pattern.
"""

import re
from typing import Any

DEFAULT_TARGETS: dict[str | None, list[str]] = {
    architecture: targets.split()
    for targets, architectures in {
        "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
        "qwen2 qwen3",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "q v": "t5 mt5",
        "c_attn": "gpt2 gpt_bigcode",
        "q v q_proj v_proj": "blip-2",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "Wqkv": "mpt",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "q_proj v_proj fc1 fc2": "phi",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }.items()
    for architecture in architectures.split()
}

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that a task adds to a model; they are trained in full (PEFT's lists)."""

UNCALLED_LAYERS = {
    "(Falcon)?MambaMixer": ("conv1d", "x_proj", "dt_proj", "out_proj"),
    "(Mamba2|Bamba|FalconH1|NemotronHMamba2|Zamba2Mamba)Mixer|GraniteMoeHybridMambaLayer": ("conv1d", "out_proj"),
    "JambaMambaMixer": ("conv1d", "dt_proj"),
    "RecurrentGemmaRecurrentBlock": ("conv_1d",),
    "Gemma3nTextAltUp": ("correction_coefs",),
}
"""Layers whose weights a module of this class (a regular expression) reads without calling them, always or in its fused
kernels. Their adapters would be skipped. PEFT refuses `out_proj` and `conv1d` of some of them."""

ATTENTION = ("self_attn", "attn", "self_attention", "attention", "linear_attn", "layer.0.SelfAttention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "layer.2.DenseReluDense", "layer.1.DenseReluDense",
                 "fc2", "output.dense")  # fmt: skip
"""Names of a layer's two sub-layers; the first that exists is used. The last two stand for architectures without an MLP
module, in which the linear layer at the end of the MLP takes its place."""


def is_weight_read_without_call(parent: Any, name: str) -> bool:
    """Return whether `parent` reads the weight of its layer `name` without calling the layer (`UNCALLED_LAYERS`)."""
    class_name, last = type(parent).__name__, name.rpartition(".")[2]
    return any(last in layers and re.fullmatch(parents, class_name) for parents, layers in UNCALLED_LAYERS.items())


def get_model_type(model: Any) -> str | None:
    """Return `config.model_type` of a transformers model, None for other modules."""
    return getattr(getattr(model, "config", None), "model_type", None)


def get_text_config(model: Any) -> Any:
    """Return the config of a model's text part, None if the model has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
