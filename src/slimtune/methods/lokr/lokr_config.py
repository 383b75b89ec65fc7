"""LoKr's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import config_field
from ...extras.rank_limits import require_rank_fitting_layer_size
from ..loha.loha_config import LycorisConfig

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr: a Kronecker product beside frozen layers; PEFT's field names and defaults."""

    name: ClassVar = "lokr"
    prefix: ClassVar = "lokr_"
    learning_rate: ClassVar = 3e-3

    decompose_both: bool = config_field(False, "make W1 a product too, where r is below half its larger side")
    decompose_factor: int = config_field(-1, "largest size of W1; -1: as near to a square as the layer allows", ge=-1)
    rank_dropout_scale: bool = config_field(
        False, "rescale the outputs that rank_dropout leaves, so that their mean stays"
    )
    init_weights: bool | Literal["lycoris"] = config_field(
        True, 'W1 starts at zero; "lycoris": W2; False: none, for tests'
    )

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.decompose_factor == 0:
            yield self.error("decompose_factor", "-1, or at least 1")

    def build(self, site: AdapterSite) -> AdapterModule:
        from .lokr_modules import ConvLoKr, LinearLoKr

        require_rank_fitting_layer_size(site, self.get_rank(site.name))
        return (ConvLoKr if site.kind == "conv" else LinearLoKr)(site, self)
