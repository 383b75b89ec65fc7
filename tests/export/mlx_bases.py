"""Tiny bases of the families of the MLX tests, and adapters of them that mlx-lm's own `mlx_lm.lora` trains."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers as tf

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3_text": {  # √96 = 9.798, which mlx-lm rounds to 9.8125
        "hidden_size": 96,
        "sliding_window": 16,
        "layer_types": LAYERS,
        "query_pre_attn_scalar": 16,
    },
    "mistral": {"sliding_window": None},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 256},
}
MORE_FAMILIES = {
    "gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 16}, "gemma": {}, "granite": {"logits_scaling": 2.0},
    "olmo2": {}, "smollm3": {"no_rope_layers": [1, 1, 1, 0]}, "stablelm": {},
    "starcoder2": {"sliding_window": None}, "cohere": {},
    "glm4": {"tie_word_embeddings": False}, "seed_oss": {"attention_bias": False},
}  # fmt: skip
"""Families that the slow tests try, too."""
ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES}
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 14,
    "patch_size": 7,
}  # fmt: skip


def save_base(family: str, folder: Path, tokenizer: object) -> Path:
    """Save a tiny base of a family as transformers does, with weights as large as trained ones."""
    torch.manual_seed(0)
    if family == "gemma3":  # a model that also sees images
        parts = {"text_config": {**SIZES, **FAMILIES["gemma3_text"]}, "vision_config": VISION, "mm_tokens_per_image": 1}
        config = tf.AutoConfig.for_model(family, **parts)
    else:
        config = tf.AutoConfig.for_model(family, **{**SIZES, **ALL_FAMILIES[family]})
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_in_mlx_lm(jobs: list[dict], folder: Path) -> None:
    """Train adapters by `mlx_lm.lora`, one after the other in one process; a job is some of its arguments."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        rows = [{"text": f"{name} {i}: the quick brown fox jumps over the lazy dog " * 2} for i in range(8)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"train": True, "iters": 4, "batch_size": 2, "val_batches": 1, "learning_rate": 2e-2, "data": str(data)}
    script = (
        "import sys, json, types; from mlx_lm.lora import CONFIG_DEFAULTS, run\n"
        "for job in json.load(sys.stdin): run(types.SimpleNamespace(**{**CONFIG_DEFAULTS, **job}))"
    )
    given = json.dumps([{**common, **job} for job in jobs])
    done = subprocess.run([sys.executable, "-c", script], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
