"""Optimizer parameter groups: methods may train some parameters with another learning rate (LoRA+)."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError


def get_lr_multipliers(model: Any) -> dict[int, float]:
    """Return factors on the learning rate by a parameter's `id`; parameters that are not listed have factor 1."""
    found: dict[int, float] = {}
    for adapter in model.peft_config:
        for module in model.adapter_modules(adapter).values():
            multipliers = module.lr_multipliers()
            found |= {id(p): multipliers[n] for n, p in module.named_parameters() if n in multipliers}
    return {i: m for i, m in found.items() if m != 1}


def parameter_groups(model: Any, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups; each group's `lr` is multiplied by its method's factor.

    Only matrices decay; biases, magnitudes and other vectors do not.
    """
    multipliers = get_lr_multipliers(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((multipliers.get(id(p), 1.0), p.dim() > 1), []).append(p)
    return [
        {"params": params, "lr": lr * multiplier, "weight_decay": weight_decay if is_matrix else 0.0}
        for (multiplier, is_matrix), params in groups.items()
    ]


def create_loraplus_optimizer(
    model: Any, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Return an optimizer in which B's learning rate is `loraplus_lr_ratio` (typically 1 to 16) times A's, `lr`.

    `LoraConfig(lr_ratio=…)` sets the same ratio in the config, which `slimtune train` uses. `kwargs` are the
    optimizer's; also `loraplus_weight_decay` (0.0) for matrices and `loraplus_lr_embedding` (1e-6) for embeddings.
    """
    if loraplus_lr_ratio <= 0:
        raise UsageError(f"loraplus_lr_ratio is {loraplus_lr_ratio}", "above 0, typically 1 to 16")
    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    # PEFT's four groups in PEFT's order, of which some may be empty: schedulers with a setting per group count on it.
    B_lr = lr * loraplus_lr_ratio
    settings = [(lr, decay), (embedding_lr, decay), (B_lr, decay), (B_lr, 0.0)]
    groups: list[dict[str, Any]] = [{"params": [], "lr": r, "weight_decay": d} for r, d in settings]
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_B = "lora_B" in name or p.dim() == 1
            group = 1 if "lora_embedding_" in name else 0 if not is_B else 3 if "bias" in name else 2
            groups[group]["params"].append(p)
    return optimizer_cls(groups, **{**kwargs, "lr": lr})
