"""PEFT's optimizers of LoRAs: B learns faster than A (LoRA+), and AdamW that trains B alone (LoRA-FA).

    g_B ← (1 / s²) g_B (A Aᵀ)⁻¹          with W + s · B A, and A as it started

That is the gradient of B nearest to that of full fine-tuning; of a layer's input only A x has to be kept for the
backward pass. Other trained parameters get a plain AdamW step. `LoraConfig(freeze_a=True)` freezes A in the same way
and leaves the gradient as it is.

Papers: LoRA+ https://arxiv.org/abs/2402.12354, LoRA-FA https://arxiv.org/abs/2308.03303.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError, UsageError

_DAMPING = 1e-8


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


class LoraFAOptimizer(Optimizer):
    """AdamW whose groups also have `names`, the parameters' names, and `scaling_factors`, the scales s of LoRA's.

    Args:
        params: parameter groups, as `create_lorafa_optimizer` makes them.
        lr: learning rate.
        betas: decay of the mean gradient and of the mean squared gradient.
        eps: added to the root of the mean squared gradient.
        weight_decay: share of a parameter that a step of learning rate 1 removes.
        correct_bias: correct the means for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        limits = [("lr", lr, math.inf), ("beta", betas[0], 1), ("beta", betas[1], 1), ("eps", eps, math.inf)]
        for name, value, limit in limits:
            if not 0 <= value < limit:
                raise ConfigError(f"{name} is {value}", f"at least 0 and below {limit}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; of a LoRA only B."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_name = dict(zip(group["names"], group["params"], strict=True))
            for (name, parameter), scale in zip(by_name.items(), group["scaling_factors"], strict=True):
                if parameter.grad is None or _is_A(name):
                    continue
                A = by_name[name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")]
                gradient = (
                    parameter.grad if A is parameter else _precondition_lora_fa_gradient(parameter.grad, A, scale)
                )
                self._update(parameter, gradient, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = lr
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-step_size)
        parameter.mul_(1 - lr * group["weight_decay"])


def _precondition_lora_fa_gradient(gradient: Tensor, A: Tensor, scale: float) -> Tensor:
    """Return `(1 / s²) g (A Aᵀ)⁻¹` of B's gradient g `(out, r)` and `A (r, in)`, in g's dtype."""
    wide = A.to(torch.promote_types(A.dtype, torch.float32))
    gram = wide @ wide.t()
    gram.diagonal().add_(_DAMPING)
    return (gradient.to(gram.dtype) @ torch.linalg.pinv(gram) / scale**2).to(gradient.dtype)


def create_lorafa_optimizer(
    model: Any, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """Freeze A of all LoRAs of a model and return the optimizer of its trained parameters.

    Args:
        model: the adapted model.
        r, lora_alpha, use_rslora: as in the config of the active LoRAs; each layer's own scale counts.
        lr: learning rate.
        weight_decay: share of a parameter that a step of learning rate 1 removes.
    """
    for adapter in model.active_adapters:
        config = model.peft_config[adapter]
        given = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
        for name, value in given.items():
            if value != getattr(config, name, value):
                message = f"{name} is {value}, and adapter {adapter!r} has another one"
                raise ConfigError(message, f"{getattr(config, name)}, as in its config")
    scales: dict[int, float] = {}
    for adapter in model.peft_config:
        for site, module in model.adapter_modules(adapter).items():
            for name, parameter in module.named_parameters():
                if name.startswith(("lora_A", "lora_B", "lora_embedding_")):
                    scales[id(parameter)] = module.scale
                if _is_A(name):
                    parameter.requires_grad_(False)
                    if not parameter.any():
                        what = "is zero, and LoRA-FA does not train it: this adapter cannot learn anything"
                        warnings.warn(f"A of {site} {what}", stacklevel=2)
    names, parameters = zip(*model.named_parameters(), strict=True)
    factors = [scales.get(id(p)) for p in parameters]
    group = {"params": list(parameters), "names": list(names), "scaling_factors": factors}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def _is_A(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name
