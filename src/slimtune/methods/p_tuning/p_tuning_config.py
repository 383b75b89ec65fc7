"""P-tuning's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.peft_config import config_field
from ...extras.prompt_learning.prompt_config import PromptLearningConfig

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


class PromptEncoderReparameterizationType(StrEnum):
    """The kind of the small network (PEFT's names)."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: learned embeddings from a small network; PEFT's field names and defaults."""

    name: ClassVar = "p_tuning"
    learning_rate: ClassVar = 1e-4
    recipe_defaults: ClassVar = {"num_virtual_tokens": 20, "neutral_start": True}
    short_names: ClassVar = {"tokens": "num_virtual_tokens", "hidden": "encoder_hidden_size"}

    encoder_reparameterization_type: PromptEncoderReparameterizationType | Literal["MLP", "LSTM"] = config_field(
        "MLP", 'the network: "MLP" (three linear layers) or "LSTM" (bidirectional, then two linear layers)'
    )
    encoder_hidden_size: int | None = config_field(None, "width of the network; None: the model's hidden size", ge=1)
    encoder_num_layers: int = config_field(2, "layers of the LSTM; an MLP always has three", ge=1, le=100)
    encoder_dropout: float = config_field(0.0, "probability of dropping an activation between LSTM layers", ge=0, lt=1)

    def normalize(self) -> None:
        """Replace the enum by its string, as files store it."""
        super().normalize()
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type)  # type: ignore[assignment]

    def fill_from_model(self, model: Any) -> None:
        super().fill_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        from ..prompt_tuning.prompt_tuning_modules import build_soft_prompt_and_attention_masks
        from .p_tuning_modules import PromptEncoder

        return build_soft_prompt_and_attention_masks(self, sites, PromptEncoder(self, sites[0].init_device))
