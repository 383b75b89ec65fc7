"""BitFit: y = W x + b + d, with W and b frozen: the biases train, those of linear maps and of normalisations.

d (out) starts at zero, so the model starts unchanged. Parameters added per layer: out. Merged: b + d. Llama and its
relatives have no biases: there `new_biases` adds some, which then have no place to be merged into.

Paper: https://arxiv.org/abs/2106.10199. File format: as PEFT's, with the key `bitfit_bias`; PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterModule, MergeUnsupported, Site, SiteKind
from ..adapters.config import TargetedConfig
from ..errors import TargetError, format_names
from ..utils.linear_layers import layer_kind


@dataclass
class BitFitConfig(TargetedConfig):
    """BitFit: biases train, and nothing else; without target_modules every bias there is.

    Args:
        new_biases: also where the base has no bias; without target_modules in every linear map but the output head,
            and in every normalisation. Such an adapter cannot be merged.
    """

    name: ClassVar[str] = "bitfit"
    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear", "norm")
    short_names: ClassVar[dict[str, str]] = {"targets": "target_modules"}

    new_biases: bool = False

    def default_targets(self, model: Any) -> list[str] | None:
        """Return the linear maps and normalisations with a bias; with `new_biases`, the others too."""
        maps = {n: m for n, m in model.named_modules() if layer_kind(m) in self.kinds}
        have = [n for n, m in maps.items() if _bias_of(m) is not None]
        if not have and not self.new_biases:
            raise TargetError(
                f"no linear map or normalisation of this {type(model).__name__} has a bias",
                "a base with biases (GPT-2, BERT, OPT; Qwen2 has some)",
                "new_biases=True adds them; such an adapter cannot be merged",
            )
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [n for n in maps if n in have or maps[n] is not head] if self.new_biases else have

    def build(self, site: Site) -> AdapterModule:
        """Return what is added to the output at `site`."""
        return Bias(site)

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return what is added everywhere; without `new_biases` each target must have a bias."""
        bare = [s.name for s in sites if _bias_of(s.module) is None]
        if bare and not self.new_biases:
            raise TargetError(
                f"{len(bare)} of {len(sites)} targets have no bias, such as {format_names(bare, 2)}",
                "targets with a bias",
                "leave target_modules out for every bias there is; or new_biases=True, which cannot be merged",
            )
        return super().build_all(sites)


class Bias(AdapterModule):
    """`y + d`."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.name, self.has_base_parameter = site.name, "bias" in site.module._parameters
        self.bitfit_bias = nn.Parameter(torch.zeros(site.out_features, device=site.device, dtype=site.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `y (..., out)` to `(..., out)`."""
        return y + self.bitfit_bias.to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is, and `b + d`, or d where there is no b; refused where no bias can stand."""
        if not self.has_base_parameter:
            raise MergeUnsupported(f"{self.name} has no bias in the base to merge one into")
        own = self.bitfit_bias.to(weight.dtype)
        return weight, own if bias is None else bias + own


def _bias_of(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")
