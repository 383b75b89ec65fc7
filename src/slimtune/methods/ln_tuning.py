"""LayerNorm tuning: only the norms train, or linear layers that are named.

    y = w' ⊙ n(x) + b'        n(x): the normalised input; w' (d), b' (d): trained copies of the norm's w and b

For a linear layer y = W' x + b'. The copies start equal to the base's, so the model starts unchanged. Parameters
added per norm: d, or 2 d with a bias. Merged: w + (w' − w), and the same for b, so that several merged adapters add up
their changes.

Paper: https://arxiv.org/abs/2312.11420. File format: PEFT's `ln_tuning_layers.weight`, `ln_tuning_layers.bias`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site
from ..core.adapters.peft_config import TargetedConfig
from ..core.kernels.linear_layers import is_quantized, is_transposed, layer_kind
from ..errors import TargetError

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
    extension_fields: ClassVar = frozenset(["layers_to_transform", "layers_pattern"])
    learning_rate: ClassVar = 5e-3
    architecture_targets: ClassVar = NORMS
    kinds: ClassVar = ("norm", "linear")
    short_names: ClassVar = {"targets": "target_modules"}

    def default_targets(self, model: nn.Module) -> list[str] | None:
        norms = [n for n, m in model.named_modules() if layer_kind(m) == "norm"]
        return super().default_targets(model) or norms or None

    def build(self, site: Site) -> AdapterModule:
        return TrainedNorm(site)


class TrainedNorm(AdapterModule):
    """`w' ⊙ n(x) + b'`."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        if is_quantized(site.module):
            raise TargetError(f"{site.name} is quantized, so it cannot train", "norms, or a base in 16 or 32 bits")
        self.is_transposed = is_transposed(site.module)
        self.ln_tuning_layers = nn.Module()
        for name in ("weight", "bias"):
            base: Any = getattr(site.module, name, None)
            if base is not None:
                start = base.detach().to(site.device, site.dtype, copy=True)
                self.ln_tuning_layers.register_parameter(name, nn.Parameter(start))
                self.register_buffer(f"base_{name}", start.clone(), persistent=False)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        trained = dict(self.ln_tuning_layers.named_parameters())
        # The copies keep their dtype, since 16 bits would round away what they learn; these layers allow one dtype.
        has_one_dtype = isinstance(base.module, nn.LayerNorm) or layer_kind(base.module) == "linear"
        inputs = x.to(trained["weight"].dtype) if has_one_dtype else x
        y = base.run_base_with(trained, inputs)
        if base.inner_modules:
            # Other adapters changed this norm's output already: add what the copies change of the base's output.
            before = {name: getattr(self, f"base_{name}") for name in trained}
            return (base(x) + (y - base.run_base_with(before, inputs))).to(x.dtype)
        return y.to(x.dtype)

    def neutral_values(self, site: Site) -> dict[str, Tensor]:
        return {n: self.get_buffer(n.replace("ln_tuning_layers.", "base_")) for n, _ in self.named_parameters()}

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias, each plus the change of its copy."""
        merged: dict[str, Any] = {"weight": weight, "bias": bias}
        for name, p in self.ln_tuning_layers.named_parameters():
            change = p.to(weight.dtype) - getattr(self, f"base_{name}").to(weight.dtype)
            merged[name] = merged[name] + (change.t() if name == "weight" and self.is_transposed else change)
        return merged["weight"], merged["bias"]
