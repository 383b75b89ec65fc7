"""Adapters that PEFT itself wrote on tiny bases, and what people's tools did to such files."""

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_base(family: str, **settings):
    """A tiny random model of a family."""
    experts = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if family == "gemma3":  # a wrapper of images around the text model
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision |= {"image_size": 14, "patch_size": 7}
        config = tf.AutoConfig.for_model(family, text_config=TEXT, vision_config=vision, mm_tokens_per_image=1)
    else:
        more = experts if "moe" in family or family == "mixtral" else {}
        gpt2 = {"vocab_size": 320, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
        config = tf.AutoConfig.for_model(family, **(gpt2 if family == "gpt2" else {**TEXT, **more}) | settings)
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config)


def save_adapter(model, folder: Path, **settings) -> Path:
    """Attach one of PEFT's LoRAs, give each B values as a training does, and save it as PEFT does."""
    kind = settings.pop("kind", peft.LoraConfig)
    given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    given |= {"r": 4} if kind is peft.LoraConfig else {}
    adapted = peft.get_peft_model(model, kind(**{**given, **settings}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data += 0.01
    adapted.save_pretrained(folder)
    return folder


def save_base(model, folder: Path) -> Path:
    """Save a base as a Hugging Face folder."""
    model.save_pretrained(folder)
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    """Change a part of every key."""
    edit_tensors(folder, lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()})


def edit_tensors(folder: Path, change) -> None:
    """Replace the tensors by what `change` returns."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    """Change fields of adapter_config.json."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copy(folder: Path, to: Path) -> Path:
    """Copy an adapter to change it."""
    return Path(shutil.copytree(folder, to))
