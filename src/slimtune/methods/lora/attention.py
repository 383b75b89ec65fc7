"""LoRA at the two weights of nn.MultiheadAttention: in_proj_weight (query, key and value) and out_proj.weight.

PyTorch reads both without calling a module, so the adapted layer adds the updates where the weights are read; there is
no input to drop. File format: PEFT's, in which the keys of out_proj have one more name, `base_layer`.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...adapters.base import AdapterModule, Site
from ...errors import ConfigError
from ...kernels.low_rank import add_low_rank
from .layers import LinearLora


class AttentionWeightLora(LinearLora):
    """`W + n · s · B A` for one of the two weights."""

    times: int = 1
    """n. PEFT adds the update of out_proj twice, in its forward pass and its merge, and its files are trained so."""

    def __init__(self, site: Site, config: Any, r: int, scale: float) -> None:
        wrong = [n for n in ("use_dora", "lora_bias") if getattr(config, n)]
        wrong += ["init_lora_weights"] if config.init_lora_weights in ("eva", "corda", "lora_ga") else []
        if wrong:
            value = getattr(config, wrong[0])
            what = "DoRA" if wrong[0] == "use_dora" else f"{wrong[0]}={value!r}"
            plain = f"please set {wrong[0]} to {isinstance(value, str)}"  # PEFT's words
            message = f"MultiheadAttention does not support {what} (yet), {plain}"
            raise ConfigError(message, hint=f"or take {site.name} out of target_modules")
        if config.lora_dropout and not site.loading:
            what = "lora_dropout does nothing at an nn.MultiheadAttention, as in PEFT"
            warnings.warn(f"{site.name}: {what}", stacklevel=2)
        super().__init__(site, config, r, scale)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        return (*self.low_rank(), self.times * self.scale)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return add_low_rank(weight, *self.low_rank_factors()), bias


def double_out_projections(sites: Sequence[Site], modules: Iterable[AdapterModule]) -> None:
    """Set `times` to 2 at each out_proj whose attention module has the same adapter."""
    attentions = {site.name for site in sites if site.kind == "weight"}
    for site, module in zip(sites, modules, strict=True):
        if isinstance(module, AttentionWeightLora) and site.name.rpartition(".")[0] in attentions:
            module.times = 2
