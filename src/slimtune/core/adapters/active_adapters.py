"""Which adapters run: the selection that the adapted layers of a model share, and one layer's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...errors import UsageError

BASE_ROW = "__base__"
"""PEFT's name for a row of a mixed batch that runs the base without an adapter."""


class MixedAdapterLayerRunner(Protocol):
    """Runs the adapted layers during a call in which rows or spans of tokens use different adapters."""

    def run_layer(self, layer: Any, base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a layer, of which `base` is the base module's forward; arguments and result are the forward's."""


class AdaptedTokenPositions(Protocol):
    """The tokens of a call that one adapter changes."""

    def find_indices(self, x: Tensor, layer: str) -> Tensor:
        """Return the indices among the tokens of a layer's input `x`, `(batch, T, in)` or `(batch · T, in)`."""


@dataclass
class ActiveAdapters:
    """The adapters that run now; all adapted layers of a model share one object."""

    active: list[str] = field(default_factory=list)
    """The adapters that were chosen, in the order in which they are applied."""
    merged: list[str] = field(default_factory=list)
    """The adapters that are merged into the base: these run in place of the active ones."""
    enabled: bool = True
    """False: the base runs alone."""
    layers_with_own: list[Any] = field(default_factory=list)
    """Layers whose active adapters differ: see `LayerAdapterOverride`."""
    layer_runner: MixedAdapterLayerRunner | None = None
    """During a call in which not all tokens use the same adapters: what runs each adapted layer."""
    row_adapters: tuple[str, ...] | None = None
    """During a mixed batch: each row's adapter, `BASE_ROW` for none."""
    alora_token_positions: Mapping[str, AdaptedTokenPositions] | None = None
    """During a call with activated LoRAs: the tokens that each one changes."""
    invocation_starts: Mapping[str, Tensor] | None = None
    """While generating with activated LoRAs: the first position that each one changes, by row of the prompt."""
    caches: dict[str, Any] = field(default_factory=dict)
    """What parts keep from call to call; dropped when adapters are added, removed, chosen or moved."""

    @property
    def names(self) -> list[str]:
        """The adapters that run, in the order in which they are applied."""
        return (self.merged or self.active) if self.enabled else []

    def __getstate__(self) -> dict[str, Any]:
        # Copying one layer must not copy the others through a cache.
        return {**vars(self), "caches": {}}

    def get_token_indices(self, adapter: str, x: Tensor, layer: str) -> Tensor:
        """Return the indices of the tokens that an activated LoRA changes in a layer's input `x (batch, T, in)`.

        They count the tokens of all rows; `x` may also be `(batch · T, in)`.
        """
        if self.alora_token_positions is None:
            message = f"{layer} runs outside a call of the model: the tokens that an activated LoRA changes are unknown"
            raise UsageError(message, hint="call the adapted model itself, with input_ids")
        return self.alora_token_positions[adapter].find_indices(x, layer)


@dataclass
class LayerAdapterOverride:
    """The active adapters of one layer that differ from the model's, after `layer.set_adapter` or `enable_adapters`."""

    model_state: ActiveAdapters
    active: list[str]
    enabled: bool

    @property
    def names(self) -> list[str]:
        """The adapters that run on this layer."""
        return (self.model_state.merged or self.active) if self.enabled and self.model_state.enabled else []
