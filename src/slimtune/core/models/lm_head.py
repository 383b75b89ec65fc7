"""A language model's head, and the losses of tokens from the hidden states that go into it.

logits = s · (h Wᵀ + b), soft-capped if the architecture does so

Granite   s = 1 / logits_scaling        Cohere   s = logit_scale        Gemma 2, 3   cap = final_logit_softcapping
RecurrentGemma   cap = logits_soft_cap
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelError
from ..kernels.cross_entropy import chunked_cross_entropy, compute_target_nll, compute_target_nlls_and_hits
from ..kernels.frozen_product import FrozenLinear

ModelInputs = dict[str, Any]
"""Keyword arguments of a model's call; each architecture has its own."""


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
        if frozen and type(module) in (nn.Linear, FrozenLinear) and "forward" not in vars(module):
            return chunked_cross_entropy(h, weight, targets, bias=bias, scale=self.scale, cap=self.cap)
        return compute_target_nll(h, module, targets, self.vocabulary, scale=self.scale, cap=self.cap)

    def compute_target_nlls_and_hits(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return −log p of `targets (n)`, and whether each is the most likely token; without gradients."""
        return compute_target_nlls_and_hits(h, self.module, targets, self.vocabulary, scale=self.scale, cap=self.cap)


def get_lm_head_with_scale_and_cap(model: Any, temperature: float = 1.0) -> LMHead | None:
    """Return a model's head, its logits divided by a temperature; None if it has no output embeddings."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return None
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return LMHead(module, config.vocab_size, scale / temperature, cap and cap / temperature)


def get_hidden_states(model: Any, head: LMHead, inputs: ModelInputs) -> Tensor:
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


def get_classifier_head(model: Any) -> Any:
    """Return the head of a sequence classifier; None for other models."""
    return getattr(model, "score", None) if get_lm_head_with_scale_and_cap(model) is None else None


@torch.no_grad()
def require_matching_lm_head_loss(model: Any) -> None:
    """Compare the loss that `LMHead` computes with that of the model's own logits, from the same hidden states.

    A head may do more to its logits than its config says: transformers does not tell.

    Raises:
        ModelError: the loss would be wrong; the hint says what to change.
    """
    head = get_lm_head_with_scale_and_cap(model)
    if head is None:
        return
    device, was_training = next(model.parameters()).device, model.training
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(5 * i * i + 1) % vocabulary for i in range(24)]], device=device)
    states: list[Tensor] = []
    hook = head.module.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    finally:
        hook.remove()
        model.train(was_training)
    own = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
    ours = head.target_nll(states[-1][0, -24:-1], ids[0, 1:])
    error = ((ours - own).abs().mean() / own.std().clamp_min(1e-12)).item()
    if error > (0.05 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3):
        raise ModelError(
            f"the loss of a {type(model).__name__} differs from the model's own (by {100 * error:.2g} % of its spread):"
            " its head does more to its logits than its config says",
            "a head that multiplies, adds a bias, scales and soft-caps",
            "train it with transformers' Trainer, which uses the model's own loss",
        )
