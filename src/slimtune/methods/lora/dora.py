"""DoRA: LoRA, plus a trained magnitude m for each row of the adapted weight.

    y = c ⊙ (W + s · B A) x + b        c = m / n,  n_i = ‖(W + s · B A)_i‖

m (out) starts as n, so that c is exactly 1 and the model starts unchanged. n follows A and B, but no gradient flows
through it (§4.3 of the paper, and PEFT). No matrix of size (out, in) is built:

    n_i² = ‖W_i‖² + 2s · B_i · (W Aᵀ)_i + s² · B_i (A Aᵀ) B_iᵀ

‖W_i‖² is computed once. The output is y + (c − 1)(y − b) + s · z (c ⊙ B)ᵀ with y = W x + b and z = A x. The backward
pass needs z and the output only. The next layer mostly keeps the output anyway, and m's gradient follows from it:

    dL/dm_i = Σ g_i ((W + s · B A) x)_i / n_i = Σ g_i (out_i − b_i) / m_i

With dropout only the low-rank part gets dropped inputs; PEFT runs the frozen layer a second time, on dropped inputs.

Paper: https://arxiv.org/abs/2402.09353. File format: PEFT's, LoRA's keys and `lora_magnitude_vector`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...core.adapters.adapter_module import AdapterSite, BaseForward
from ...core.kernels.linear_layers import get_dequantized_weight
from ...core.kernels.lora_linear import add_low_rank_to_weight
from .lora_modules import EmbeddingLora, LinearLora, LoraModuleBase


class DoraCaching:
    """`with DoraCaching():` keeps the norms n of DoRA between calls in evaluation mode.

    The weights must not change meanwhile. `DoraCaching()(enabled=True)` keeps the norms until it is called with False.
    """

    enabled: ClassVar[bool] = False

    def __call__(self, enabled: bool = True) -> None:
        DoraCaching.enabled = enabled

    def __enter__(self) -> None:
        self.before, DoraCaching.enabled = DoraCaching.enabled, True

    def __exit__(self, *_: Any) -> None:
        DoraCaching.enabled = self.before


class CachedDoraNormsMixin(LoraModuleBase):
    """The norms n of DoRA, which `DoraCaching` keeps; mixed into the classes of LoRA."""

    peft_modules: ClassVar = ("lora_magnitude_vector",)

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self._dora_cache: dict[Any, Tensor] = {}

    def get_norms(self, base: BaseForward, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the norms for a weight, computed or, with `DoraCaching`, as they were in the last call."""
        if self.training or not DoraCaching.enabled or base.inner_modules:
            self._dora_cache.clear()
            return compute()
        key = (self.scale, weight.dtype, weight.device)
        if key not in self._dora_cache:
            self._dora_cache[key] = compute()
        return self._dora_cache[key]

    def train(self, mode: bool = True) -> Self:
        """Also forget the norms: the weights change now, or have changed."""
        self._dora_cache.clear()
        return super().train(mode)


class _Magnitude(CachedDoraNormsMixin):
    """The trained magnitude and what depends on it; mixed into the classes of LoRA."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self._cached_squares: tuple[Any, Tensor] | None = None
        norms = torch.ones(site.out_features, device=site.device)
        if not site.skip_init:
            weight = get_dequantized_weight(site.module).detach()
            norms = compute_dora_row_norms(
                self._base_squares(site.module, weight), weight, *self.low_rank(), scale
            ).detach()
        self.lora_magnitude_vector = nn.Parameter(norms.to(site.dtype))

    def _base_squares(self, module: Any, weight: Tensor) -> Tensor:
        """Return `‖W_i‖²` of the base's weight; computed again only after it was moved, converted or written to."""
        stored = module.weight
        key = (id(stored), None if stored.is_inference() else stored._version, stored.dtype, stored.device)
        if self._cached_squares is None or self._cached_squares[0] != key:
            self._cached_squares = (key, _squared_norms(weight))
        return self._cached_squares[1]

    def _scale_rows(self, base: BaseForward, y: Tensor, z: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Map the frozen output `y (..., out)` and `z = A x (..., r)` to the adapted output."""
        m, (weight, bias) = self.lora_magnitude_vector, base.merge_weight_and_bias()
        weight = weight.detach()

        def compute() -> Tensor:
            squares = _squared_norms(weight) if base.inner_modules else self._base_squares(base.module, weight)
            # In the dtype of m, so that m / n is exactly 1 at the start.
            return compute_dora_row_norms(squares, weight, A, B, self.scale).to(m.dtype)

        n = self.get_norms(base, weight, compute)
        flat_y, flat_z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]).to(y.dtype)
        out = _DoraOutput.apply(flat_y, flat_z, B, m, n, bias, self.scale).view(y.shape)
        # The backward pass needs the output as it is now, and Falcon adds to it in place.
        return out.clone() if any(c.__name__ == "FalconLinear" for c in type(base.module).__mro__) else out

    def low_rank_factors(self) -> None:
        """Return None: the update has no low rank."""

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor | float]:
        norms = self._base_squares(site.module, get_dequantized_weight(site.module).detach()).sqrt()
        return {**super().get_no_op_values(site), "lora_magnitude_vector": norms}

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `c ⊙ (W + s · B A)` and the unchanged bias."""
        (A, B), m = self.low_rank(), self.lora_magnitude_vector
        norms = compute_dora_row_norms(_squared_norms(weight), weight, A, B, self.scale).to(m.dtype)
        c = m.to(weight.dtype) / norms.to(weight.dtype)
        return add_low_rank_to_weight(weight, A, B, self.scale) * c[:, None], bias


class LinearDora(_Magnitude, LinearLora):
    """DoRA at a linear layer."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        A, B = self.low_rank()
        return self._scale_rows(base, base(x), F.linear(self.lora_dropout(x), A.to(x.dtype)), A, B)


class EmbeddingDora(_Magnitude, EmbeddingLora):
    """DoRA at an embedding; m has one entry for each column of its table."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        A, B = self.low_rank()
        return self._scale_rows(base, base(x), F.embedding(x, A.t()), A, B)


@torch.no_grad()
def compute_dora_row_norms(squares: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the norms `(out)` of the rows of `W + s · B A`, in the dtype of `squares`, W's squared row norms."""
    weight_A = (weight @ A.t().to(weight.dtype)).to(squares.dtype)
    A, B = A.to(squares.dtype), B.to(squares.dtype)
    change = (B * (weight_A * (2 * scale) + B @ (A @ A.t()) * scale**2)).sum(1)
    # A row of zeros has no direction: any norm above zero works.
    return (squares + change).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _squared_norms(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)


class _DoraOutput(torch.autograd.Function):
    """`y + (c − 1)(y − b) + s · z (c ⊙ B)ᵀ` with `y (T, out)`, `z (T, r)`, `B (out, r)`, `c = m / n`, and b or None.

    Written by hand, because autograd would keep several tensors of y's size; see the top of this file.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B: Tensor, m: Tensor, n: Tensor, b: Tensor | None, s: float) -> Tensor:
        ctx.s = s
        # c − 1, not c: near 1 a 16-bit c would round the whole change away.
        c_minus_1 = _c_minus_1(m, n)
        out = torch.addcmul(y, y, c_minus_1.to(y.dtype))
        if b is not None:
            out -= (c_minus_1 * b).to(y.dtype)
        out.addmm_(z, _c_times(B, c_minus_1, y.dtype).t(), alpha=s)
        ctx.save_for_backward(z, B, m, n, b, out if ctx.needs_input_grad[3] else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, B, m, n, b, out = ctx.saved_tensors
        for_y, for_z, for_B, for_m, _, for_b, _ = ctx.needs_input_grad
        c_minus_1 = _c_minus_1(m, n)
        wide = c_minus_1.dtype
        grad_y = torch.addcmul(g, g, c_minus_1.to(g.dtype)) if for_y else None
        grad_z = (g @ _c_times(B, c_minus_1, g.dtype)) * ctx.s if for_z else None
        grad_B = ((g.t() @ z).to(wide) * ((c_minus_1 + 1) * ctx.s)[:, None]).to(B.dtype) if for_B else None
        g_sum = g.sum(0, dtype=wide) if b is not None and (for_m or for_b) else None
        grad_m = None
        if for_m:
            grad_m = (g * out).sum(0, dtype=wide)
            if g_sum is not None and b is not None:
                grad_m = grad_m - g_sum * b
            # A magnitude of exactly zero hides what it multiplies: it gets no gradient.
            grad_m = torch.where(m == 0, torch.zeros_like(grad_m), grad_m / m).to(m.dtype)
        grad_b = (g_sum * -c_minus_1).to(b.dtype) if for_b and g_sum is not None and b is not None else None
        return grad_y, grad_z, grad_B, grad_m, None, grad_b, None


def _c_minus_1(m: Tensor, n: Tensor) -> Tensor:
    """Return `m / n − 1` in fp32 or wider."""
    wide = torch.promote_types(m.dtype, torch.float32)
    return m.to(wide) / n.to(wide) - 1


def _c_times(B: Tensor, c_minus_1: Tensor, dtype: torch.dtype) -> Tensor:
    return (B * (c_minus_1 + 1)[:, None]).to(dtype)
