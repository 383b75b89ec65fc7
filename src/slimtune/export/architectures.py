"""What llama.cpp calls the architectures that an adapter can be written for, and where it keeps rows in another order.

The names of tensors are gguf's own (`TensorNameMap`). A new architecture is one line here: its `model_type` in Hugging
Face's config, its name in gguf, and the maps whose output rows llama.cpp's converter permutes (`undo_permute` in
`conversion/`), which no name tells.

    permuted rows: Hugging Face rotates halves (x₀ with x_{d/2}), llama.cpp's Llama neighbours (x₀ with x₁), so row
    (h, i, j) of q and k, i < 2 and j < d/2, stands at (h, j, i) there.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import ModelError, UsageError, format_names, nearest

_CONV1D = ("c_attn", "c_proj", "c_fc")
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


@dataclass(frozen=True)
class Facts:
    """One architecture in GGUF.

    Args:
        arch: its name in gguf.
        permuted: last names of maps whose output rows are permuted, each with the config's number of heads.
        shift: what is added to the weights of norms: Gemma multiplies by 1 + w, llama.cpp by what the file says.
        transposed: last names of maps that keep their weight as `(in, out)`.
    """

    arch: str
    permuted: dict[str, str] = field(default_factory=dict)
    shift: float = 0.0
    transposed: tuple[str, ...] = ()


FACTS = {
    "llama": Facts("llama", _ROTATED),  # Llama 1 to 3, SmolLM, TinyLlama
    "mistral": Facts("llama", _ROTATED),
    "qwen2": Facts("qwen2"),
    "qwen3": Facts("qwen3"),
    "gemma": Facts("gemma", shift=1.0),
    "gemma2": Facts("gemma2", shift=1.0),
    "gemma3_text": Facts("gemma3", shift=1.0),
    "phi3": Facts("phi3"),
    "gpt2": Facts("gpt2", transposed=_CONV1D),
}


def get_architecture(config: Any) -> Facts:
    """Return the facts of a model's architecture.

    Raises:
        UsageError: there are none.
    """
    kind = config.model_type
    if kind not in FACTS:
        raise UsageError(
            f"an adapter of a {kind!r} model cannot be written as GGUF: nothing is known of how llama.cpp names and "
            f"orders its weights{nearest(kind, FACTS)}",
            f"one of {format_names(FACTS)}",
            "add a line to slimtune/export/architectures.py (it says how), or ship it merged: slimtune merge",
        )
    return FACTS[kind]


def get_tensor_names(config: Any) -> Any:
    """Return gguf's map of an architecture's names: `.get_name("model.layers.0.mlp.up_proj")` is "blk.0.ffn_up".

    Raises:
        UsageError: as `facts_of`.
        ModelError: the package gguf is not installed.
    """
    arch = get_architecture(config).arch
    gguf = package()
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(known, config.get_text_config().num_hidden_layers)


def package() -> Any:
    """Return the package gguf.

    Raises:
        ModelError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("writing a GGUF needs the package gguf, which is not installed", hint="pip install gguf")
    import gguf

    return gguf


def as_llama_cpp(weight: Tensor, name: str, config: Any) -> Tensor:
    """Return a weight as llama.cpp keeps it.

    Args:
        weight: a parameter of the model.
        name: its name there, with `.weight` or `.bias`.
        config: the model's.
    """
    facts = get_architecture(config)
    module, _, what = name.rpartition(".")
    if what == "weight" and module.rpartition(".")[2] in facts.transposed:
        weight = weight.t()
    if facts.shift and weight.dim() == 1 and module.endswith("norm"):
        weight = weight + facts.shift
    return permute_rope_rows(weight, module, config)


def permute_rope_rows(rows: Tensor, module: str, config: Any) -> Tensor:
    """Return the output rows of a map, `(out, …)`, in llama.cpp's order.

    Args:
        rows: a weight, or a LoRA's B.
        module: the map's name in the model.
        config: the model's.
    """
    heads = get_architecture(config).permuted.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    parts = rows.reshape(getattr(config.get_text_config(), heads), 2, -1, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)
