"""LoRA and DoRA at a convolution with groups g: `y + s · B ∗ (A ∗ x)`.

    A (r, in, *kernel) has the stride, padding and dilation of the base and no groups; B (out, r / g, 1, …) has g groups

With g = 1 the update is that of the flattened weight, and it merges. With more groups an output sees, through A, all
inputs, which the base's weight (out, in / g, *kernel) cannot store: such an update cannot be merged.

File format: PEFT's. Its A has neither the dilation nor the padding mode of the base, so that its update differs from
what it merges, or does not run; here the two are equal.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterSite, BaseForward, MergeUnsupported
from ...core.kernels.dropout import make_dropout
from ...errors import ConfigError
from .dora import CachedDoraNormsMixin
from .lora_init import initialize_lora_factors
from .lora_modules import LoraModuleBase

_CLASSES: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvLora(LoraModuleBase):
    """`y + s · B ∗ (A ∗ dropout(x))` for a convolution."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        conv: Any = site.module
        self.name, self.groups = site.name, conv.groups
        if r % conv.groups:
            message = f"the rank is {r}, and {site.name} is a {type(conv).__name__} with groups={conv.groups}"
            hint = f"rank_pattern={{{site.name!r}: {conv.groups}}}, or leave it out of target_modules"
            raise ConfigError(message, f"a rank that {conv.groups} divides", hint)
        if self.init == "lora_ga":
            self.init = True  # as in PEFT, so that a model with other layers can start from its gradients
        if not isinstance(self.init, bool) and self.init != "gaussian":
            message = f"init_lora_weights is {self.init!r}, and {site.name} is a convolution"
            raise ConfigError(message, "True, False or 'gaussian'", "take it out of target_modules")
        if conv.groups > 1 and not site.skip_init:
            warnings.warn(f"{site.name} has groups={conv.groups}: a LoRA on it cannot be merged", stacklevel=2)
        self.lora_dropout = make_dropout(config.lora_dropout)
        cls, device = _CLASSES[len(conv.kernel_size)], site.init_device
        geometry = {n: getattr(conv, n) for n in ("stride", "padding", "dilation", "padding_mode")}
        # In PEFT's order: one seed gives the same adapter in both libraries.
        self.lora_A = cls(conv.in_channels, r, conv.kernel_size, bias=False, device=device, **geometry)
        self.lora_B = cls(r, conv.out_channels, 1, groups=conv.groups, bias=config.lora_bias, device=device)
        initialize_lora_factors(self.init, self.lora_A, self.lora_B)
        self.to(site.device, site.dtype)
        if config.freeze_a:
            self.freeze_parameter("lora_A.weight")

    def update(self, x: Tensor) -> Tensor:
        """Return `s · B ∗ (A ∗ dropout(x))`, with B's bias, in the dtype of A."""
        return self.lora_B(self.lora_A(self.lora_dropout(x).to(self.lora_A.weight.dtype))) * self.scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y + self.update(x)).to(y.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return `A (r, in · kernel size)` and `B (out, r)`; with groups they are not factors of the update."""
        A, B = self.lora_A.weight, self.lora_B.weight
        return A.flatten(1), B.view(-1, len(A))

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A, B, scale)`; None with groups, or with a bias on B."""
        return None if self.groups > 1 or self.lora_B.bias is not None else super().low_rank_factors()

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.groups > 1:
            raise MergeUnsupported(
                f"{self.name} is a convolution with {self.groups} groups, whose LoRA cannot be merged"
            )
        return weight + self.weight_change(weight), self.add_bias(bias, weight.dtype)

    def weight_change(self, weight: Tensor) -> Tensor:
        """Return `s · B A` with the shape and dtype of `weight (out, in / groups · kernel size)`."""
        A, B = self.low_rank()
        return (B.to(weight.dtype) @ A.to(weight.dtype)).view_as(weight) * self.scale


class ConvDora(CachedDoraNormsMixin, ConvLora):
    """`y = c ⊙ (W + s · B A) ∗ x + b` with `c = m / n`; with groups n is, as in PEFT, that of B A in W's shape."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        norms = torch.ones(site.out_features, device=site.device)
        if not site.skip_init:
            norms = self._row_norms(site.weight())
        shape = (1, -1, *[1] * (self.lora_A.weight.dim() - 2))
        self.lora_magnitude_vector = nn.Parameter(norms.to(site.dtype).view(shape))

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        weight, bias = base.merge_weight_and_bias()
        y = base(x)
        channels = (-1, *[1] * (self.lora_A.weight.dim() - 2))
        norms = self.get_norms(base, weight, lambda: self._row_norms(weight))
        c = self._row_factors(norms).view(channels)
        # c − 1, not c: near 1 a 16-bit c would round the whole change away.
        change = (c - 1) * (y if bias is None else y - bias.view(channels))
        return (y + change + c * self.update(x)).to(y.dtype)

    def low_rank_factors(self) -> None:
        """Return None: the update has no low rank."""

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor | float]:
        norms = site.weight().norm(dim=1).view_as(self.lora_magnitude_vector)
        return {**super().get_no_op_values(site), "lora_magnitude_vector": norms}

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `c ⊙ (W + s · B A)` and the unchanged bias."""
        merged, bias = super().merge_into(weight, bias)
        return merged * self._row_factors(self._row_norms(weight)).to(weight.dtype)[:, None], bias

    def _row_factors(self, norms: Tensor) -> Tensor:
        """Return `c = m / n (out)`, whose n gets no gradient."""
        m = self.lora_magnitude_vector.flatten()
        return m / norms.to(m.dtype)  # in the dtype of m, so that it is exactly 1 at the start

    @torch.no_grad()
    def _row_norms(self, weight: Tensor) -> Tensor:
        """Return the norms `(out)` of the rows of `W + s · B A`."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # A row of zeros has no direction: any norm above zero works.
        return (wide + self.weight_change(wide)).norm(dim=1).clamp_min(torch.finfo(wide.dtype).tiny)
