"""LayerNorm tuning: the normalisations train, all else is frozen.

    y = w' ⊙ n(x) + b'        n(x): the input normalised; w' (d), b' (d): the adapter's own copies of w and b

The copies start as the base's, so the model starts unchanged. Parameters added per normalisation: d, or 2 d with a
bias. Merged: w + (w' − w), and so for b: several adapters add up what each has learned.

Paper: https://arxiv.org/abs/2312.11420. File format: PEFT's `ln_tuning_layers.weight`, `ln_tuning_layers.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapters.base import AdapterModule, BaseForward, Site, SiteKind
from ..adapters.config import TargetedConfig
from ..utils.linear_layers import layer_kind

_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_GEMMA2 = [*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
_QWEN = ["post_attention_layernorm"]
_T5 = ["layer_norm", "final_layer_norm"]
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
"""By architecture: the normalisations that train where none is named (PEFT's choice; of LLaVA's the normalisations)."""


@dataclass
class LNTuningConfig(TargetedConfig):
    """LayerNorm tuning: normalisations train copies of their own weights; PEFT's field names and defaults.

    Without target_modules: PEFT's choice for the architecture, and every normalisation where PEFT has none.
    """

    name: ClassVar[str] = "ln_tuning"
    extension_fields: ClassVar[frozenset[str]] = frozenset(["layers_to_transform", "layers_pattern"])
    learning_rate: ClassVar[float] = 5e-3
    kinds: ClassVar[tuple[SiteKind, ...]] = ("norm",)
    short_names: ClassVar[dict[str, str]] = {"targets": "target_modules"}

    @classmethod
    def targets_by_architecture(cls) -> Mapping[str | None, list[str]]:
        """Return the normalisations by architecture."""
        return NORMS

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """Return PEFT's choice for the architecture, else every normalisation there is."""
        every = [n for n, m in model.named_modules() if layer_kind(m) == "norm"]
        return super().default_targets(model) or every or None

    def build(self, site: Site) -> AdapterModule:
        """Return the copies for the normalisation at `site`."""
        return OwnNorm(site)


class OwnNorm(AdapterModule):
    """`w' ⊙ n(x) + b'`."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ln_tuning_layers = nn.Module()
        for name in ("weight", "bias"):
            base: Any = getattr(site.module, name, None)
            if base is not None:
                start = base.detach().to(site.device, site.dtype, copy=True)
                self.ln_tuning_layers.register_parameter(name, nn.Parameter(start))
                self.register_buffer(f"base_{name}", start.clone(), persistent=False)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., d)` to `(..., d)`."""
        own = dict(self.ln_tuning_layers.named_parameters())
        # The copies keep their own dtype, since 16 bits would round away what they learn; torch's LayerNorm takes one.
        given = x.to(own["weight"].dtype) if isinstance(frozen.module, nn.LayerNorm) else x
        y = frozen.run_base_with(own, given)
        if frozen.inner_modules:
            # What lies below adds to the same normalised input: to its answer comes what the copies differ by.
            base = {name: getattr(self, f"base_{name}") for name in own}
            return (frozen(x) + (y - frozen.run_base_with(base, given))).to(x.dtype)
        return y.to(x.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias `(d)`, each with what the copy differs by."""
        given = {"weight": weight, "bias": bias}
        wide = {n: p.to(weight.dtype) for n, p in self.ln_tuning_layers.named_parameters()}
        after = {n: given[n] + (p - getattr(self, f"base_{n}").to(weight.dtype)) for n, p in wide.items()}
        return after["weight"], after.get("bias", bias)
