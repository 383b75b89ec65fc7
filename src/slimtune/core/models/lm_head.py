"""A language model's head, and the losses of tokens from the hidden states that go into it.

logits = s · (h Wᵀ + b), soft-capped if the architecture does so

Granite   s = 1 / logits_scaling        Cohere   s = logit_scale        Gemma 2, 3   cap = final_logit_softcapping
RecurrentGemma   cap = logits_soft_cap
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels.cross_entropy import chunked_cross_entropy, compute_target_nll, nll_and_accuracy


@dataclass(frozen=True)
class LMHead:
    """The head of a language model."""

    module: nn.Module  # computes `h Wᵀ + b`
    vocabulary: int  # number of logits
    scale: float = 1.0
    cap: float | None = None

    def target_nll(self, h: Tensor, targets: Tensor) -> Tensor:
        """Return −log p of `targets (n)` given hidden states `h (n, d)`, fp32 or wider, without keeping all logits."""
        module: Any = self.module
        weight, bias = module.weight, getattr(module, "bias", None)
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        # An adapted, quantized or offloaded head must be called.
        if frozen and type(module) is nn.Linear and "forward" not in vars(module):
            return chunked_cross_entropy(h, weight, targets, bias=bias, scale=self.scale, cap=self.cap)
        return compute_target_nll(h, module, targets, self.vocabulary, scale=self.scale, cap=self.cap)

    def nll_and_accuracy(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return −log p of `targets (n)`, and whether each is the most likely token; without gradients."""
        return nll_and_accuracy(h, self.module, targets, self.vocabulary, scale=self.scale, cap=self.cap)


def get_lm_head(model: Any) -> LMHead | None:
    """Return a model's head as its config describes it; None if it has no output embeddings."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return None
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return LMHead(module, config.vocab_size, scale, cap)


def get_hidden_states(model: Any, head: LMHead, inputs: dict[str, Any]) -> Tensor:
    """Return the head's input `(batch, tokens, d)` when the model is called with `inputs`.

    The whole model runs as always, with its adapters and wrappers; only the head gets a tensor without tokens.
    """
    states: list[Tensor] = []

    def take_input(module: nn.Module, args: tuple) -> tuple:
        states.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = head.module.register_forward_pre_hook(take_input)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return states[0]
