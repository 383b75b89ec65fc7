"""Learning rates by parameter: a method may want some of its parameters to learn faster (LoRA+)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError


def get_lr_multipliers(model: Any) -> dict[int, float]:
    """Return factors on the learning rate by a parameter's `id`, where a method wants another one than 1."""
    found: dict[int, float] = {}
    for adapter in model.peft_config:
        for delta in model._attached.deltas(adapter).values():
            wanted = delta.lr_multipliers()
            found |= {id(p): wanted[n] for n, p in delta.named_parameters() if n in wanted}
    return {i: f for i, f in found.items() if f != 1}


def parameter_groups(model: Any, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the trained parameters as an optimizer takes them, in groups by rate.

    Args:
        model: the adapted model.
        lr: the learning rate; a group's own is this times what its method asks for.
        weight_decay: for matrices; biases, magnitudes and other vectors do not decay.
    """
    of = get_lr_multipliers(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((of.get(id(p), 1.0), p.dim() > 1), []).append(p)
    return [
        {"params": params, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), params in groups.items()
    ]


def group_by_learning_rate(optimizer: Optimizer, model: Any) -> None:
    """Give the parameters of an optimizer that has not stepped yet the rates their methods ask for."""
    of = get_lr_multipliers(model) if hasattr(model, "peft_config") else {}
    for group in list(optimizer.param_groups):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_factor.setdefault(of.get(id(p), 1.0), []).append(p)
        rest = {k: v for k, v in group.items() if k not in ("params", "lr")}
        for at, (factor, params) in enumerate(by_factor.items()):
            if at == 0:
                lr = group["lr"]
                group.update(params=params, lr=lr * factor)
            else:
                optimizer.add_param_group({**rest, "params": params, "lr": lr * factor})


def create_loraplus_optimizer(
    model: Any, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Return an optimizer in which B learns `loraplus_lr_ratio` times as fast as A (PEFT's function).

    `LoraConfig(lr_ratio=…)` says the same where the config is, and `slimtune train` follows it.

    Args:
        model: the adapted model.
        optimizer_cls: the optimizer's class.
        lr: A's learning rate.
        loraplus_lr_ratio: B's over A's, 1 and up.
        kwargs: for the optimizer; `loraplus_weight_decay` (0.0) for matrices, `loraplus_lr_embedding` (1e-6) for
            A and B of embeddings.
    """
    if loraplus_lr_ratio <= 0:
        raise UsageError(f"loraplus_lr_ratio is {loraplus_lr_ratio}", "above 0, typically 1 to 16")
    decay, embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            how = (embedding, decay)
        elif "lora_B" in name or p.dim() == 1:
            how = (lr * loraplus_lr_ratio, 0.0 if "bias" in name else decay)
        else:
            how = (lr, decay)
        groups.setdefault(how, []).append(p)
    kwargs["lr"] = lr
    return optimizer_cls([{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in groups.items()], **kwargs)
