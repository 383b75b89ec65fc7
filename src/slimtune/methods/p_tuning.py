"""P-tuning: prompt tuning whose n embeddings are the output of a small network, which trains in their place.

    [P_1 … P_n, x_1 … x_T] → the frozen model,   P = f(E),   E (n, hidden)

    MLP    f = W3 relu(W2 relu(W1 E))                  W1 (h, hidden), W2 (h, h), W3 (hidden, h), with biases
    LSTM   f = W2 relu(W1 LSTM(E)), bidirectional      W1 (2h, 2h), W2 (hidden, 2h), with biases

Parameters added: n · hidden and f's own, which only training needs: afterwards P is a table. It cannot be merged.

Paper: https://arxiv.org/abs/2103.10385. File format: PEFT's `prompt_embeddings (n, hidden)`, which is P, and beside it
E and f as `prompt_encoder.…`, so that training can continue. A file without them (PEFT's) loads as a table P.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, Site
from ..core.adapters.peft_config import setting
from ..core.adapters.prompt import PromptLearningConfig
from .prompt_tuning import build_prompt


class PromptEncoderReparameterizationType(StrEnum):
    """The kind of the small network (PEFT's names)."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: learned embeddings from a small network; PEFT's field names and defaults."""

    name: ClassVar = "p_tuning"
    learning_rate: ClassVar = 3e-3
    recipe_defaults: ClassVar = {"num_virtual_tokens": 20}
    short_names: ClassVar = {"tokens": "num_virtual_tokens", "hidden": "encoder_hidden_size"}

    encoder_reparameterization_type: PromptEncoderReparameterizationType | Literal["MLP", "LSTM"] = setting(
        "MLP", 'the network: "MLP" (three linear layers) or "LSTM" (bidirectional, then two linear layers)'
    )
    encoder_hidden_size: int | None = setting(None, "width of the network; None: the model's hidden size", ge=1)
    encoder_num_layers: int = setting(2, "layers of the LSTM; an MLP always has three", ge=1, le=100)
    encoder_dropout: float = setting(0.0, "probability of dropping an activation between LSTM layers", ge=0, lt=1)

    def check(self) -> None:
        """Replace the enum by its string, as files store it."""
        super().check()
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type)  # type: ignore[assignment]

    def fill_from_model(self, model: Any) -> None:
        super().fill_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        return build_prompt(self, sites, PromptEncoder(self, sites[0].init_device))


class PromptEncoder(nn.Module):
    """`n` embeddings through a small network, created in PEFT's order: one seed gives the same in both libraries."""

    def __init__(self, config: Any, device: torch.device | None = None) -> None:
        super().__init__()
        n = config.num_virtual_tokens * config.num_transformer_submodules
        hidden, h = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(n, hidden, device=device)
        self.lstm_head: nn.LSTM | None = None
        sizes = [(hidden, h), (h, h), (h, hidden)]
        if config.encoder_reparameterization_type == "LSTM":
            layers, p = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(hidden, h, layers, dropout=p, bidirectional=True, batch_first=True, device=device)
            sizes = [(2 * h, 2 * h), (2 * h, hidden)]
        elif config.encoder_num_layers != 2:
            # PEFT's words.
            text = "the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used."
            warnings.warn(f"for {config.encoder_reparameterization_type}, {text}", stacklevel=2)
        linears = [nn.Linear(*size, device=device) for size in sizes]
        self.mlp_head = nn.Sequential(linears[0], *(m for linear in linears[1:] for m in (nn.ReLU(), linear)))

    def forward(self) -> Tensor:
        """Return `(n, hidden)`."""
        x = self.embedding.weight
        return self.mlp_head(x if self.lstm_head is None else self.lstm_head(x[None])[0][0])
