"""LLaMA-Adapter's adapter modules."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterSite, BaseForward
from ...core.attention.packed_layout import RowMask
from ...core.kernels.linear_layers import get_dequantized_weight
from ...extras.prompt_learning.learned_prefix import AttentionPrefix, gated_prefix_attention
from ...extras.prompt_learning.prompt_modules import PrefixAttentionModule


class GatedPrompt(PrefixAttentionModule):
    """Learned tokens of one layer, with their gate."""

    no_op_values: ClassVar = {"adaption_gate": 0.0}

    def __init__(self, site: AdapterSite, config: Any) -> None:
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
        return F.linear(P, get_dequantized_weight(linear).to(P.dtype), linear.bias)  # type: ignore[arg-type]


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
