"""LoRA trained through the rounding of its merged weight (quantization-aware training).

    y = Q(W + s · B A) x + b        Q: to the nearest value that the file to be exported can hold

Q is a staircase, whose own gradient is zero. So the gradients of A and B are those of y = (W + s · B A) x + b at the
rounded weight: a straight-through estimator, https://arxiv.org/abs/1308.3432.

    dx = g Q(…)        dA = s · (g B)ᵀ x        dB = s · gᵀ (x Aᵀ)

A merge gives Q(…), so what is exported is the model that was trained. The rounded weight is kept until an optimizer
takes a step: the micro-batches of a step share it. It takes as much memory as the base's weight.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...core.adapters.adapter_module import AdapterSite, BaseForward
from ...core.foundation.registry import Registry
from ...core.kernels.linear_layers import is_quantized
from ...core.kernels.lora_linear import add_low_rank_to_weight, needs_unfused_operations
from ...core.kernels.rms_norm import find_rms_norm_node, recompute_rms_norm_output
from ...errors import ConfigError, UsageError
from .lora_modules import LinearLora


class WeightRounding(Protocol):
    """Rounds the weights of one layer as the export does."""

    def round(self, merged: Tensor, base: Tensor) -> Tensor:
        """Return a merged weight `(out, in)` in fp32, rounded; the base's weight `(out, in)` says to which values."""


WEIGHT_ROUNDINGS: Registry[Any] = Registry("slimtune.weight_roundings", "weight rounding")
"""Functions that return the `WeightRounding` of each named linear layer of a model, by the precision."""


_optimizer_steps = 0
"""Steps of all optimizers of this process. A fused step leaves the version counters of the parameters as they are."""


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class RoundedLinearLora(LinearLora):
    """LoRA at a linear layer whose merged weight is rounded in the forward pass."""

    rounding: WeightRounding
    """Set after the module is built."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self.site_name = site.name
        # A plan counts the memory of the steps that round.
        self.rounds_while_training = config.qat_start == 0 or site.device.type == "meta"
        self._rounded: tuple[Any, Tensor] | None = None

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        if self.training and not self.rounds_while_training:
            return super().forward_with_base(base, x)
        if base.inner_modules:
            message = f"{self.site_name}: another adapter changes the weight that this one rounds"
            raise UsageError(message, "one adapter at a time, where it was trained with qat")
        weight = self.get_rounded_weight(base.weight(), x.dtype)
        A, B = self.low_rank()
        if needs_unfused_operations(x):
            update = add_low_rank_to_weight(torch.zeros_like(weight), A, B, self.scale)
            return F.linear(x, weight + (update - update.detach()), base.bias())
        return _StraightThroughLinear.apply(x, weight, base.bias(), A, B, self.scale)

    @torch.no_grad()
    def get_rounded_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rounded merged weight `(out, in)` for the base's weight, as long as neither changes."""
        tensors = [t for t in (*self.parameters(), *self.buffers()) if not t.is_inference()]
        key = (_optimizer_steps, dtype, weight.device, self.scale, *((id(t), t._version) for t in tensors))
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = None  # released before the next one is computed
            self._rounded = (key, self.merge_into(weight, None)[0].to(dtype))
        return self._rounded[1]

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the rounded merged weight in fp32 or wider, and the unchanged bias."""
        base = weight.float()
        rounded = self.rounding.round(self.merge_without_rounding(base), base)
        return rounded.to(torch.promote_types(weight.dtype, torch.float32)), bias

    def merge_without_rounding(self, weight: Tensor) -> Tensor:
        """Return the merged weight `(out, in)` that is rounded, for the base's weight in fp32."""
        return add_low_rank_to_weight(weight, *self.low_rank(), self.scale)

    def extra_state(self) -> dict[str, Tensor]:
        return {"rounds_while_training": torch.tensor(self.rounds_while_training)}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.rounds_while_training = bool(state["rounds_while_training"])

    def low_rank_factors(self) -> None:
        """Return None: the change of the weight has no low rank."""

    @property
    def has_strength(self) -> bool:
        """Return False: without an update the weight is rounded, too."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rounded": None}


def build_rounded_lora(site: AdapterSite, config: Any, r: int, scale: float) -> RoundedLinearLora:
    """Return the module for a site; raise ConfigError if its weight cannot be rounded as the export does."""
    if site.kind != "linear" or is_quantized(site.module):
        what = "is quantized already" if site.kind == "linear" else f"is a {type(site.module).__name__}"
        message = f"qat is {config.qat!r}, and {site.name} {what}"
        raise ConfigError(message, "linear layers in 16 or 32 bits")
    return RoundedLinearLora(site, config, r, scale)


def set_weight_roundings(model: nn.Module, modules: Mapping[str, Any], precision: str) -> None:
    """Give each adapter module, by its site, the rounding of its layer."""
    roundings = WEIGHT_ROUNDINGS.load("gguf")(model, list(modules), precision)
    for name, module in modules.items():
        module.rounding = roundings[name]


class _StraightThroughLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rounded: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        need_A, need_B = ctx.needs_input_grad[3:5]
        z = flat @ A.to(x.dtype).t() if need_B else None
        ctx.norm = find_rms_norm_node(x) if need_A else None  # its output, x, is quickly computed again
        ctx.save_for_backward(flat if need_A and ctx.norm is None else None, z, rounded, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(x, rounded, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, rounded, A, B = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = (g @ rounded).view(ctx.shape) if need_x else None
        if need_A and ctx.norm is not None:
            x = recompute_rms_norm_output(ctx.norm).reshape(-1, ctx.shape[-1])
        grad_A = ((g @ B.to(g.dtype)).mul_(ctx.scale).t() @ x).to(A.dtype) if need_A else None
        grad_B = (z.t() @ g).mul_(ctx.scale).to(B.dtype).t() if need_B else None
        return grad_x, None, g.sum(0) if need_bias else None, grad_A, grad_B, None
