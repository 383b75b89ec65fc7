"""OFT's settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class OFTConfig(TargetedConfig):
    """OFT: an orthogonal, block-diagonal rotation of a linear layer's input; PEFT's field names and defaults."""

    name: ClassVar = "oft"
    prefix: ClassVar = "oft_"
    learning_rate: ClassVar = 4e-4
    kinds: ClassVar = ("linear", "embedding", "conv")
    short_names: ClassVar = {"block_size": "oft_block_size", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = config_field(0, "number of blocks; 0: oft_block_size gives it; one of the two must be 0", ge=0)
    oft_block_size: int = config_field(
        32, "inputs rotated together, at least 2; 0: r gives it; becomes the nearest divisor of the inputs", ge=0
    )
    module_dropout: float = config_field(0.0, "fraction of the blocks that are the identity in one step", ge=0, lt=1)
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "oft_only"] = config_field("none", BIAS_HELP)
    init_weights: bool = config_field(
        True, "True: zeros, so that R is the identity; False: normal with std 0.1, for tests"
    )
    coft: bool = config_field(False, "keep the rotation small: ‖Q_i‖ at most eps / √(number of blocks)")
    eps: float = config_field(6e-5, "limit of the rotation with coft", gt=0)
    block_share: bool = config_field(False, "one block for all parts of the input")
    use_cayley_neumann: bool = config_field(
        True, "compute R by the series, which is faster; False: by the exact transform, which rotates the opposite way"
    )
    num_cayley_neumann_terms: int = config_field(5, "terms of the series; 3 means 4, as in PEFT", ge=2, le=1000)

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.oft_block_size == 1:
            yield self.error("oft_block_size", "0, or at least 2: a single input cannot rotate")
        if (self.r == 0) == (self.oft_block_size == 0):
            yield self.error("oft_block_size", f"above 0 where r is 0, else 0; r is {self.r}")

    def build(self, site: AdapterSite) -> AdapterModule:
        """Return the rotation at `site`; a block size of 1, which rotates nothing, is refused, and others may warn."""
        from .oft_modules import BlockRotation, ConvOft, EmbeddingOft, LinearOft, nearest_divisor

        if site.kind == "conv":
            site.require_ungrouped("OFT")
        width = site.out_features if site.kind == "embedding" else site.in_features
        size = width // nearest_divisor(width, self.r) if self.r else nearest_divisor(width, self.oft_block_size)
        layer = f"{site.name} has {width} {'columns' if site.kind == 'embedding' else 'inputs'}"
        fits = size * self.r == width if self.r else size == self.oft_block_size
        if not site.skip_init and size == 1:  # a file keeps the size it was trained with
            smallest = next((d for d in range(2, width + 1) if width % d == 0), None)
            hint = f"{'r=0, ' if self.r else ''}oft_block_size={smallest}, or " if smallest else ""
            message = f"{layer}, which no block size near the configured one divides"
            raise ConfigError(message, "a block of at least 2", f"{hint}leave the layer out")
        if not site.skip_init and not fits:
            configured = f"r={self.r}" if self.r else f"oft_block_size={self.oft_block_size}"
            warnings.warn(f"{layer}: its blocks have size {size} instead of {configured}", stacklevel=2)
        cls = {"embedding": EmbeddingOft, "conv": ConvOft}.get(site.kind, LinearOft)
        return cls(BlockRotation(width, size, site, self))
