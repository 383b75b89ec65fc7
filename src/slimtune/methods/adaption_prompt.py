"""LLaMA-Adapter: beside the attention of the upper layers a second one, over m learned tokens, through a gate.

    softmax(q Kᵀ · scale) V  +  g · softmax(q Kpᵀ · scale) Vp        Kp = Wk P, Vp = Wv P

P (m, hidden) and the scalar g are learned for each of the top layers; Wk and Wv are the layer's own, frozen and without
rotation. g starts at zero, so the model starts bit for bit unchanged. Parameters added: (m · hidden + 1) · layers.
Nothing is merged.

Paper: https://arxiv.org/abs/2303.16199. File format: PEFT's `…self_attn.adaption_prompt (1, m, hidden)` and
`…self_attn.adaption_gate (1)`. In GPT-2 PEFT adds the second part behind the output projection, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import BaseForward, RowMask, Site, SiteKind
from ..adapters.config import PeftConfig
from ..adapters.prompt import AttentionModule
from ..attention.prefix import AttentionPrefix, find_attention_modules, gated_prefix_attention
from ..errors import TargetError, format_names, nearest
from ..utils.linear_layers import get_weight


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: gated attention over learned tokens; PEFT's field names and defaults.

    Args:
        target_modules: name of the attention modules ("self_attn"); None: what the model calls them.
        adapter_len: learned tokens m of a layer, 1 and up; the paper's are 10.
        adapter_layers: how many layers get them, counted from the top, 1 and up; None: all (PEFT wants a number).
    """

    name: ClassVar[str] = "adaption_prompt"
    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    learning_rate: ClassVar[float] = 9e-3
    recipe_defaults: ClassVar[dict[str, Any]] = {"adapter_len": 10}
    short_names: ClassVar[dict[str, str]] = {"tokens": "adapter_len", "layers": "adapter_layers"}

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    @property
    def is_adaption_prompt(self) -> bool:
        """True: this is PEFT's LLaMA-Adapter."""
        return True

    def check(self) -> None:
        """Check that the sizes are whole numbers, 1 and up."""
        super().check()
        self.require_whole("adapter_len")
        self.require_whole("adapter_layers", none=True)

    def infer_from_model(self, model: Any) -> None:
        """Fill in the modules' name and how many layers there are."""
        found = find_attention_modules(model)
        self.target_modules = self.target_modules or found[0].rpartition(".")[2]
        self.adapter_layers = self.adapter_layers or len(found)

    def further_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the attention modules of the top layers."""
        found = find_attention_modules(model)
        named = [n for n in found if n.endswith(f".{self.target_modules}")]
        if not named:
            tails = sorted({n.rpartition(".")[2] for n in found})
            near = nearest(str(self.target_modules), tails)
            raise TargetError(
                f"target_modules={self.target_modules!r} names no attention module{near}", format_names(tails)
            )
        if (self.adapter_layers or 0) > len(named):
            raise TargetError(f"adapter_layers is {self.adapter_layers}", f"at most the model's {len(named)} layers")
        return dict.fromkeys(named[-(self.adapter_layers or len(named)) :], "attention")

    def build(self, site: Site) -> GatedPrompt:
        """Return the learned tokens of one layer."""
        module = site.module
        m = self.adapter_len
        assert m is not None
        if hasattr(module, "c_attn"):
            return Gpt2Prompt(site, m)
        if not all(hasattr(module, n) for n in ("k_proj", "v_proj")) or hasattr(module, "k_norm"):
            raise TargetError(
                f"{site.name} is a {type(module).__name__}, whose keys are normed, or which has no k_proj and v_proj",
                "attention with k_proj and v_proj (Llama, Mistral, Qwen2, Gemma 2), or GPT-2's",
                "prefix tuning works on this model",
            )
        return GatedPrompt(site, m)


class GatedPrompt(AttentionModule):
    """Learned tokens beside the sequence of one layer."""

    def __init__(self, site: Site, m: int) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.empty(1, m, site.in_features, device=site.init_device).normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=site.init_device))
        self.to(site.device, site.dtype)

    def prefix(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return `Wk P`, `Wv P` and the gate."""
        projections = (self._through(module.get_submodule(n), rows) for n in ("k_proj", "v_proj"))
        keys, values = (t.unflatten(1, (-1, module.head_dim)).transpose(0, 1) for t in projections)
        return AttentionPrefix(keys, values, self.adaption_gate)

    def _through(self, linear: nn.Module, rows: RowMask) -> Tensor:
        """Return the learned tokens through a frozen map, `(m, out)`."""
        weight: Any = linear.weight
        P = self.adaption_prompt[0].to(weight.dtype if weight.is_floating_point() else self.adaption_prompt.dtype)
        if rows is None:
            return linear(P)
        # In a mixed batch the map may be adapted for other rows: these ones' is the base's.
        return F.linear(P, get_weight(linear).to(P.dtype), linear.bias)  # type: ignore[arg-type]


class Gpt2Prompt(GatedPrompt):
    """The same for GPT-2, whose keys and values come from one map; added behind the output projection, as in PEFT."""

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the attention and add the second one to its output."""
        module: Any = base.module
        x = args[0] if args else kwargs["hidden_states"]
        out = base(*args, **kwargs)
        heads = (-1, module.head_dim)
        query = module.c_attn(x).chunk(3, dim=-1)[0].unflatten(-1, heads).transpose(1, 2)
        _, keys, values = (
            t.unflatten(1, heads).transpose(0, 1) for t in self._through(module.c_attn, rows).chunk(3, 1)
        )
        more = gated_prefix_attention(
            query, AttentionPrefix(keys, values, self.adaption_gate), rows, module.head_dim**-0.5
        )
        return (out[0] + more.flatten(2), *out[1:])
