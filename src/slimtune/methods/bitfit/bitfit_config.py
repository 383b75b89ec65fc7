"""BitFit's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.adapters.peft_config import TargetedConfig, config_field
from ...errors import TargetError, format_names

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class BitFitConfig(TargetedConfig):
    """BitFit: train biases only; without target_modules every bias of the model."""

    name: ClassVar = "bitfit"
    exists_in_peft: ClassVar = False
    learning_rate: ClassVar = 1e-3
    kinds: ClassVar = ("linear", "norm")
    short_names: ClassVar = {"targets": "target_modules"}

    new_biases: bool = config_field(
        False, "add biases where the base has none, by default everywhere but at the output head; cannot be merged"
    )

    def default_targets(self, model: Any) -> list[str] | None:
        """Return the linear layers and norms that have a bias; with `new_biases` the others too."""
        from ...core.kernels.linear_layers import get_base_layer_type
        from .bitfit_modules import has_bias

        layers = {n: m for n, m in model.named_modules() if get_base_layer_type(m) in self.kinds}
        if self.new_biases:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            return [n for n, m in layers.items() if has_bias(m) or m is not head]
        with_bias = [n for n, m in layers.items() if has_bias(m)]
        if not with_bias:
            raise TargetError(
                f"no linear layer or norm of this {type(model).__name__} has a bias",
                "a base with biases (GPT-2, BERT, OPT; Qwen2 has some)",
                "new_biases=True adds biases; such an adapter cannot be merged",
            )
        return with_bias

    def build(self, site: AdapterSite) -> AdapterModule:
        from .bitfit_modules import BiasDelta

        return BiasDelta(site)

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        from .bitfit_modules import has_bias

        without_bias = [s.name for s in sites if not has_bias(s.module)]
        if without_bias and not self.new_biases:
            raise TargetError(
                f"{len(without_bias)} of {len(sites)} targets have no bias, such as {format_names(without_bias, 2)}",
                "targets with a bias",
                "leave target_modules out for every bias of the model; or new_biases=True, which cannot be merged",
            )
        return super().build_all(sites)
