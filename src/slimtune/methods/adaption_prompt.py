"""LLaMA-Adapter: the attention of the upper layers also attends to m learned tokens, through a gate.

    softmax(q Kᵀ · scale) V  +  g · softmax(q Kpᵀ · scale) Vp        Kp = Wk P, Vp = Wv P

Each of the top layers learns P (m, hidden) and a scalar g; Wk and Wv are the layer's own, frozen and without rotary
embeddings. g starts at zero, so the model starts bit for bit unchanged. Parameters added: (m · hidden + 1) · layers. It
cannot be merged.

Paper: https://arxiv.org/abs/2303.16199. File format: PEFT's `…self_attn.adaption_prompt (1, m, hidden)` and
`…self_attn.adaption_gate (1)`. In GPT-2 the second term is added after the output projection, as in PEFT.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site, SiteKind
from ..core.adapters.peft_config import PeftConfig, setting
from ..core.adapters.prompt import AttentionModule
from ..core.attention.learned_prefix import AttentionPrefix, find_attention_modules, gated_prefix_attention
from ..core.attention.packed_layout import RowMask
from ..core.kernels.linear_layers import get_weight
from ..errors import TargetError, format_names, nearest


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: gated attention to learned tokens; PEFT's field names and defaults."""

    name: ClassVar = "adaption_prompt"
    mergeable: ClassVar = False
    kinds: ClassVar = ("attention",)
    learning_rate: ClassVar = 9e-3
    recipe_defaults: ClassVar = {"adapter_len": 10}
    short_names: ClassVar = {"tokens": "adapter_len", "layers": "adapter_layers"}
    is_adaption_prompt: ClassVar = True

    target_modules: str | None = setting(None, 'name of the attention modules ("self_attn"); None: found in the model')
    adapter_len: int | None = setting(None, "learned tokens of a layer, required; 10 in the paper", ge=1)
    adapter_layers: int | None = setting(None, "how many layers get them, counted from the top; None: all", ge=1)

    def check_required(self) -> None:
        self.require(self.adapter_len is not None, "adapter_len", "an integer, at least 1")

    def fill_from_model(self, model: Any) -> None:
        names = find_attention_modules(model)
        self.target_modules = self.target_modules or names[0].rpartition(".")[2]
        self.adapter_layers = self.adapter_layers or len(names)

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the attention modules of the top layers."""
        names = find_attention_modules(model)
        matching = [n for n in names if n.endswith(f".{self.target_modules}")]
        if not matching:
            endings = sorted({n.rpartition(".")[2] for n in names})
            similar = nearest(str(self.target_modules), endings)
            message = f"target_modules={self.target_modules!r} names no attention module{similar}"
            raise TargetError(message, format_names(endings))
        count = self.adapter_layers or len(matching)
        if count > len(matching):
            raise TargetError(f"adapter_layers is {count}", f"at most the model's {len(matching)} layers")
        return dict.fromkeys(matching[-count:], "attention")

    def build(self, site: Site) -> AdapterModule:
        module: Any = site.module
        if hasattr(module, "c_attn"):
            return Gpt2GatedPrompt(site, self)
        if not hasattr(module, "k_proj") or not hasattr(module, "v_proj") or hasattr(module, "k_norm"):
            raise TargetError(
                f"{site.name} is a {type(module).__name__}, which lacks k_proj and v_proj or normalizes its keys",
                "attention with k_proj and v_proj (Llama, Mistral, Qwen2, Gemma 2), or GPT-2's",
                "prefix tuning works on this model",
            )
        return GatedPrompt(site, self)


class GatedPrompt(AttentionModule):
    """Learned tokens of one layer, with their gate."""

    neutral: ClassVar = {"adaption_gate": 0.0}

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        tokens = torch.empty(1, config.adapter_len, site.in_features, device=site.init_device).normal_()
        self.adaption_prompt = nn.Parameter(tokens)
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=site.init_device))
        self.to(site.device, site.dtype)

    def compute_prefix_key_values(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return `Wk P`, `Wv P` and the gate."""
        projections = (self._project_tokens(module.get_submodule(n), rows) for n in ("k_proj", "v_proj"))
        keys, values = (t.unflatten(1, (-1, module.head_dim)).transpose(0, 1) for t in projections)
        return AttentionPrefix(keys, values, self.adaption_gate)

    def _project_tokens(self, linear: nn.Module, rows: RowMask) -> Tensor:
        """Return the learned tokens after a frozen linear layer, `(m, out)`."""
        weight: Any = linear.weight
        P = self.adaption_prompt[0].to(weight.dtype if weight.is_floating_point() else self.adaption_prompt.dtype)
        if rows is None:
            return linear(P)
        # In a mixed batch the layer may carry adapters of other rows: use the base's weight only.
        return F.linear(P, get_weight(linear).to(P.dtype), linear.bias)  # type: ignore[arg-type]


class Gpt2GatedPrompt(GatedPrompt):
    """The same for GPT-2, where one layer gives keys and values; added after the output projection, as in PEFT."""

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        module: Any = base.module
        x = args[0] if args else kwargs["hidden_states"]
        out = base(*args, **kwargs)
        heads = (-1, module.head_dim)
        query = module.c_attn(x).chunk(3, dim=-1)[0].unflatten(-1, heads).transpose(1, 2)
        projections = self._project_tokens(module.c_attn, rows).chunk(3, 1)[1:]
        keys, values = (t.unflatten(1, heads).transpose(0, 1) for t in projections)
        prefix = AttentionPrefix(keys, values, self.adaption_gate)
        gated = gated_prefix_attention(query, prefix, rows, module.head_dim**-0.5)
        return (out[0] + gated.flatten(2), *out[1:])
