"""BitFit's adapter modules."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, MergeUnsupported


class BiasDelta(AdapterModule):
    """`y + d`."""

    no_op_values: ClassVar = {"bitfit_bias": 0.0}

    def __init__(self, site: AdapterSite) -> None:
        super().__init__()
        self.name, self.base_can_store_merge = site.name, "bias" in site.module._parameters
        self.bitfit_bias = nn.Parameter(torch.zeros(site.out_features, device=site.device, dtype=site.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bitfit_bias.to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.base_can_store_merge:
            raise MergeUnsupported(f"{self.name} has no bias in the base to merge one into")
        added = self.bitfit_bias.to(weight.dtype)
        return weight, added if bias is None else bias + added


def has_bias(module: nn.Module) -> bool:
    """Return whether the base's module has a bias."""
    return module._parameters.get("bias") is not None
