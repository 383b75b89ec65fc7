"""P-tuning: prompt tuning whose n embeddings are the output of a small network, which trains in their place.

    [P_1 … P_n, x_1 … x_T] → the frozen model,   P = f(E),   E (n, hidden)

    MLP    f = W3 relu(W2 relu(W1 E))                  W1 (h, hidden), W2 (h, h), W3 (hidden, h), with biases
    LSTM   f = W2 relu(W1 LSTM(E)), bidirectional      W1 (2h, 2h), W2 (hidden, 2h), with biases

Parameters added: n · hidden and f's own, which only training needs: afterwards P is a table. It cannot be merged.

Paper: https://arxiv.org/abs/2103.10385. File format: PEFT's `prompt_embeddings (n, hidden)`, which is P, and beside it
E and f as `prompt_encoder.…`, so that training can continue. A file without them (PEFT's) loads as a table P.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.config_fields import setting
from ..adapters.prompt import LearnedEmbeddings, PromptLearningConfig, PromptModule


class PromptEncoderReparameterizationType(StrEnum):
    """The kind of the small network (PEFT's names)."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: learned embeddings from a small network; PEFT's field names and defaults."""

    name: ClassVar[str] = "p_tuning"
    learning_rate: ClassVar[float] = 3e-3
    recipe_defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 20}
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens", "hidden": "encoder_hidden_size"}

    encoder_reparameterization_type: PromptEncoderReparameterizationType | Literal["MLP", "LSTM"] = setting(
        "MLP", 'the network: "MLP" (three linear layers) or "LSTM" (bidirectional, then two linear layers)'
    )
    encoder_hidden_size: int | None = setting(None, "width of the network; None: the model's hidden size", ge=1)
    encoder_num_layers: int = setting(2, "layers of the LSTM; an MLP always has three", ge=1)
    encoder_dropout: float = setting(
        0.0, "probability of dropping an activation between two layers of the LSTM", ge=0, lt=1
    )

    def check(self) -> None:
        """Replace the enum by its string, as files store it."""
        super().check()
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type)  # type: ignore[assignment]

    def infer_from_model(self, model: Any) -> None:
        """Fill in the sizes from the model's config."""
        super().infer_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def build(self, site: Site) -> EncodedPrompt:
        """Return the network at the backbone."""
        self.require(self.token_dim == site.in_features, "token_dim", f"{site.in_features}, as the model's embeddings")
        assert self.num_virtual_tokens is not None
        assert self.encoder_hidden_size is not None
        sizes = self.num_virtual_tokens, site.in_features, self.encoder_hidden_size
        if self.encoder_reparameterization_type == "MLP":
            return EncodedPrompt(site, MlpEncoder(*sizes, site.init_device))
        return EncodedPrompt(
            site, LstmEncoder(*sizes, site.init_device, layers=self.encoder_num_layers, dropout=self.encoder_dropout)
        )


class EncodedPrompt(LearnedEmbeddings, PromptModule):
    """Virtual tokens that a small network computes."""

    def virtual_embeddings(self) -> Tensor:
        """Return the virtual tokens `(n, hidden)`."""
        return self.get_embeddings()


class MlpEncoder(nn.Module):
    """`n` embeddings through three linear layers, created in PEFT's order: one seed gives the same in both."""

    def __init__(self, n: int, hidden: int, h: int, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, hidden, device=device)
        sizes = [(hidden, h), (h, h), (h, hidden)]
        first, second, third = (nn.Linear(*size, device=device) for size in sizes)
        self.mlp_head = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self) -> Tensor:
        """Return `(n, hidden)`."""
        return self.mlp_head(self.embedding.weight)


class LstmEncoder(nn.Module):
    """`n` embeddings through a bidirectional LSTM and two linear layers."""

    def __init__(self, n: int, hidden: int, h: int, device: torch.device, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, hidden, device=device)
        self.lstm_head = nn.LSTM(
            hidden, h, layers, dropout=dropout, bidirectional=True, batch_first=True, device=device
        )
        first, second = nn.Linear(2 * h, 2 * h, device=device), nn.Linear(2 * h, hidden, device=device)
        self.mlp_head = nn.Sequential(first, nn.ReLU(), second)

    def forward(self) -> Tensor:
        """Return `(n, hidden)`."""
        return self.mlp_head(self.lstm_head(self.embedding.weight[None])[0])[0]
