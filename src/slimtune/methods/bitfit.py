"""BitFit: y = W x + b + d, with W and b frozen: only biases train, of linear layers and of norms.

d (out) starts at zero, so the model starts unchanged. Parameters added per layer: out. Merged: b + d. Llama and similar
models have no biases: `new_biases` adds some, which the merged model then has no place for.

Paper: https://arxiv.org/abs/2106.10199. File format: PEFT's layout with the key `bitfit_bias`; PEFT lacks this method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, MergeUnsupported, Site
from ..core.adapters.peft_config import TargetedConfig, setting
from ..core.kernels.linear_layers import layer_kind
from ..errors import TargetError, format_names


@dataclass
class BitFitConfig(TargetedConfig):
    """BitFit: train biases only; without target_modules every bias of the model."""

    name: ClassVar = "bitfit"
    learning_rate: ClassVar = 1e-3
    kinds: ClassVar = ("linear", "norm")
    short_names: ClassVar = {"targets": "target_modules"}

    new_biases: bool = setting(
        False, "add biases where the base has none, by default everywhere but at the output head; cannot be merged"
    )

    def default_targets(self, model: Any) -> list[str] | None:
        """Return the linear layers and norms that have a bias; with `new_biases` the others too."""
        layers = {n: m for n, m in model.named_modules() if layer_kind(m) in self.kinds}
        if self.new_biases:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            return [n for n, m in layers.items() if _has_bias(m) or m is not head]
        with_bias = [n for n, m in layers.items() if _has_bias(m)]
        if not with_bias:
            raise TargetError(
                f"no linear layer or norm of this {type(model).__name__} has a bias",
                "a base with biases (GPT-2, BERT, OPT; Qwen2 has some)",
                "new_biases=True adds biases; such an adapter cannot be merged",
            )
        return with_bias

    def build(self, site: Site) -> AdapterModule:
        return AddedBias(site)

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        without_bias = [s.name for s in sites if not _has_bias(s.module)]
        if without_bias and not self.new_biases:
            raise TargetError(
                f"{len(without_bias)} of {len(sites)} targets have no bias, such as {format_names(without_bias, 2)}",
                "targets with a bias",
                "leave target_modules out for every bias of the model; or new_biases=True, which cannot be merged",
            )
        return super().build_all(sites)


class AddedBias(AdapterModule):
    """`y + d`."""

    neutral: ClassVar = {"bitfit_bias": 0.0}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.name, self.has_base_parameter = site.name, "bias" in site.module._parameters
        self.bitfit_bias = nn.Parameter(torch.zeros(site.out_features, device=site.device, dtype=site.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bitfit_bias.to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.has_base_parameter:
            raise MergeUnsupported(f"{self.name} has no bias in the base to merge one into")
        added = self.bitfit_bias.to(weight.dtype)
        return weight, added if bias is None else bias + added


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None
