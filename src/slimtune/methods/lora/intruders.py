"""Intruder dimensions: directions that fine-tuning puts among a weight's largest and that the base does not have.

    W + ΔW = U S Vᵀ        an intruder: one of the k largest u_i with max_j |u_i · u_j(W)| < ε
    ΔW ← ΔW − (1 − λ) Σ u_i s_i v_iᵀ over the intruders, and A, B its nearest pair of the same rank

Less of the base's knowledge is forgotten, and a part of what was learned.

Paper: https://arxiv.org/abs/2410.21228.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...core.kernels.linear_layers import get_dequantized_weight
from ...errors import ConfigError
from ...extras.low_rank_approximation import make_low_rank_approximation
from .lora_modules import EmbeddingLora, LinearLora


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a copy of a LoRA with weaker intruder dimensions and activate it.

    Args:
        peft_model: a model with a plain LoRA.
        old_adapter_name, new_adapter_name: the adapter to copy, and the name of the copy.
        top_k: number of largest directions to look at.
        threshold_epsilon: largest cosine with the base's directions below which a direction is an intruder.
        mitigation_lambda: share of an intruder that stays, in [0, 1].
        logging_sink: is called with a line per layer; None: nothing.
    """
    modules = peft_model.adapter_modules(old_adapter_name)
    for name, module in modules.items():
        plain = isinstance(module, LinearLora | EmbeddingLora) and module.low_rank_factors() is not None
        if not plain or module.low_rank()[0].shape[0] != module.r:
            message = f"adapter {old_adapter_name!r} at {name} is not a plain LoRA and is therefore not supported"
            raise ConfigError(message, "a LoRA without DoRA, a bias or a start that is subtracted")
    peft_model.add_adapter(new_adapter_name, dataclasses.replace(peft_model.peft_config[old_adapter_name]))
    for name, copy in peft_model.adapter_modules(new_adapter_name).items():
        layer, old = peft_model.get_submodule(name), modules[name]
        copy.load_state_dict(old.state_dict())
        A, B, scale = old.low_rank_factors()
        # PEFT's order of an embedding: its directions are those of the tokens.
        is_embedding = isinstance(old, EmbeddingLora)
        weight, change = get_dequantized_weight(layer).detach().float(), (B.float() @ A.float()) * scale
        if is_embedding:
            weight, change = weight.t(), change.t()
        U_base = torch.linalg.svd(weight, full_matrices=False)[0]
        U, S, Vh = torch.linalg.svd(weight + change, full_matrices=False)
        cosines = (U[:, :top_k].t() @ U_base).abs().amax(1)
        intruders = (cosines < threshold_epsilon).nonzero()[:, 0]
        if logging_sink is not None:
            logging_sink(f"{name}: Intruders: {len(intruders)}" if len(intruders) else f"{name}: No intruders")
        if not len(intruders):
            continue
        change += (mitigation_lambda - 1) * (U[:, intruders] * S[intruders]) @ Vh[intruders]
        near = make_low_rank_approximation((change.t() if is_embedding else change) / scale, old.r)
        root = near.B.norm(dim=0).sqrt()  # A and B share the singular values
        new = {"A": near.A * root[:, None], "B": near.B / root.clamp_min(torch.finfo(root.dtype).tiny)}
        for parameter_name, parameter in copy.named_parameters():
            parameter.copy_(new[parameter_name.removesuffix(".weight")[-1]])
    peft_model.set_adapter(new_adapter_name)
