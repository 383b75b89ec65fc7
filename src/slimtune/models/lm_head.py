"""From a model's last hidden states to logits: the head's weight and what is done to its product.

    logits = s · (h Wᵀ + b), soft-capped where the architecture does

    Granite   s = 1 / logits_scaling        Cohere   s = logit_scale        Gemma 2, 3   cap = final_logit_softcapping

`states` runs a model as it always runs, but for the head: what would go into it is taken, and the head is given no row.
So embeddings, adapters and wrappers of the whole model stay where they are.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels.cross_entropy import chunked_cross_entropy, nll_and_accuracy, target_nll


@dataclass(frozen=True)
class LMHead:
    """The last map of a language model.

    Args:
        module: the module that gives logits.
        vocabulary: how many.
        scale: its product is multiplied by this.
        cap: soft cap on the logits, None: none.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def nats(self, h: Tensor, targets: Tensor) -> Tensor:
        """Return −log p of `targets (n)` after the states `h (n, d)`, fp32 or wider; no full logits are made."""
        module: Any = self.module
        weight, bias = module.weight, getattr(module, "bias", None)
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        # Adapted, quantized or offloaded, it has to be called.
        if frozen and type(module) is nn.Linear and "forward" not in vars(module):
            return chunked_cross_entropy(h, weight, targets, bias=bias, scale=self.scale, cap=self.cap)
        return target_nll(h, module, targets, self.vocabulary, scale=self.scale, cap=self.cap)

    def judge(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return −log p of `targets (n)` after `h (n, d)`, and whether each is the likeliest token; no gradient."""
        return nll_and_accuracy(h, self.module, targets, self.vocabulary, scale=self.scale, cap=self.cap)


def get_lm_head(model: Any) -> LMHead | None:
    """Return a model's head as its config describes it, None where it has none of its own."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = config.logit_scale
    return LMHead(module, config.vocab_size, scale, getattr(config, "final_logit_softcapping", None))


def get_hidden_states(model: Any, head: LMHead, inputs: dict[str, Any]) -> Tensor:
    """Return what goes into the head `(batch, columns, d)` when the model is called with `inputs`."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple) -> tuple:
        taken.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = head.module.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return taken[0]
