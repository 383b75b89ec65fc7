"""LayerNorm tuning's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.adapters.peft_config import TargetedConfig

if TYPE_CHECKING:
    from torch import nn

    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_GEMMA2 = [*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
_QWEN, _T5 = ["post_attention_layernorm"], ["layer_norm", "final_layer_norm"]
_BLOOM = ["input_layernorm", "post_attention_layernorm", "ln_f"]
NORMS: dict[str | None, list[str]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "llava"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("qwen2", "qwen3"), _QWEN),
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "phi": ["input_layernorm", "final_layernorm"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
}
"""The norms that train by default, by architecture (PEFT's choice; for LLaVA only the norms of it)."""


@dataclass
class LNTuningConfig(TargetedConfig):
    """LayerNorm tuning: train copies of the norms' weights; PEFT's field names and defaults.

    Without target_modules: PEFT's choice for the architecture, or every norm where PEFT has no choice.
    """

    name: ClassVar = "ln_tuning"
    prefix: ClassVar = "ln_tuning_"
    fields_not_in_peft: ClassVar = frozenset(["layers_to_transform", "layers_pattern"])
    learning_rate: ClassVar = 5e-3
    architecture_targets: ClassVar = NORMS
    kinds: ClassVar = ("norm", "linear")
    short_names: ClassVar = {"targets": "target_modules"}

    def default_targets(self, model: nn.Module) -> list[str] | None:
        from ...core.kernels.linear_layers import get_base_layer_type

        norms = [n for n, m in model.named_modules() if get_base_layer_type(m) == "norm"]
        return super().default_targets(model) or norms or None

    def build(self, site: AdapterSite) -> AdapterModule:
        from .ln_tuning_modules import TrainedNorm

        return TrainedNorm(site)
