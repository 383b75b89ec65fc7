"""(IA)³'s adapter modules."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.adapters.targets import matches_regex_or_names


def matches_suffix_or_regex(suffixes_or_regex: list[str] | str, name: str) -> bool:
    """Return whether a name matches: any ending does, as in PEFT, not only one that starts at a dot."""
    return (
        matches_regex_or_names(suffixes_or_regex, name)
        if isinstance(suffixes_or_regex, str)
        else name.endswith(tuple(suffixes_or_regex))
    )


class ScaledOutput(AdapterModule):
    """`l ⊙ y`; for a convolution by channel."""

    no_op_values: ClassVar = {"ia3_l": 1.0}

    def __init__(self, site: AdapterSite, init_ia3_weights: bool) -> None:
        super().__init__()
        self.is_conv = site.kind == "conv"
        self.ia3_l = _make_factors(site, init_ia3_weights, (site.out_features, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # In the dtype of the factors: 16-bit numbers near one would round away what was learned.
        return (y * (self.ia3_l[0] if self.is_conv else self.ia3_l.flatten())).to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        l = self.ia3_l.to(weight.dtype).flatten()  # noqa: E741 (the paper's letter)
        return weight * l[:, None], None if bias is None else bias * l


class ScaledInput(AdapterModule):
    """`W (l ⊙ x) + b`; for a convolution by channel."""

    no_op_values: ClassVar = {"ia3_l": 1.0}
    scales_input = True

    def __init__(self, site: AdapterSite, init: bool) -> None:
        super().__init__()
        self.is_conv, self.groups = site.kind == "conv", getattr(site.module, "groups", 1)
        self.ia3_l = _make_factors(site, init, (1, getattr(site.module, "in_channels", site.in_features)))

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        return base((x * (self.ia3_l[0] if self.is_conv else self.ia3_l.flatten())).to(x.dtype))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        l = self.ia3_l.to(weight.dtype).view(self.groups, 1, -1, 1)  # noqa: E741
        # (groups, outputs of a group, inputs of a group, kernel size); a linear layer has one group and size 1.
        parts = weight.reshape(self.groups, len(weight) // self.groups, l.shape[2], -1)
        return (parts * l).view(weight.shape), bias


def _make_factors(site: AdapterSite, init: bool, shape: tuple[int, int]) -> nn.Parameter:
    """Return the factors, `shape`; for a convolution `(1, channels, 1, …)`."""
    conv: Any = site.module
    full_shape = (1, max(shape), *[1] * len(conv.kernel_size)) if site.kind == "conv" else shape
    # PEFT draws random numbers even for a start at one: one seed gives the same adapter in both libraries.
    start = torch.randn(full_shape, device=site.init_device)
    return nn.Parameter((torch.ones_like(start) if init else start).to(site.device, site.dtype))
