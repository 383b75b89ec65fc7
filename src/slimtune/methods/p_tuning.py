"""P-tuning: prompt tuning whose n embeddings a small network gives, which trains in their place.

    [P_1 … P_n, x_1 … x_T] → the frozen model,   P = f(E),   E (n, hidden)

    MLP    f = W3 relu(W2 relu(W1 E))                  W1 (h, hidden), W2 (h, h), W3 (hidden, h), with biases
    LSTM   f = W2 relu(W1 LSTM(E)), both directions    W1 (2h, 2h), W2 (hidden, 2h), with biases

Parameters added: n · hidden and f's own, which use needs no more: P is a table once trained. Nothing is merged.

Paper: https://arxiv.org/abs/2103.10385. File format: PEFT's `prompt_embeddings (n, hidden)`, which is P, and beside it
E and f as `prompt_encoder.…`, by which training goes on. A file without them (PEFT's) loads as a table P.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.prompt import LearnedEmbeddings, PromptLearningConfig, PromptModule


class PromptEncoderReparameterizationType(StrEnum):
    """What the small network is (PEFT's names)."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: learned embeddings by way of a small network; PEFT's field names and defaults.

    Args:
        encoder_reparameterization_type: "MLP" (three linear maps) or "LSTM" (both directions, then two linear maps).
        encoder_hidden_size: width h of the network, 1 and up; None: the model's hidden size.
        encoder_num_layers: layers of the LSTM, 1 and up; an MLP always has its three maps.
        encoder_dropout: probability in [0, 1) of dropping what goes from one layer of the LSTM to the next.
    """

    name: ClassVar[str] = "p_tuning"
    learning_rate: ClassVar[float] = 3e-3
    recipe_defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 20}
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens", "hidden": "encoder_hidden_size"}

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def check(self) -> None:
        """Check the network's kind and sizes."""
        super().check()
        kinds = list(PromptEncoderReparameterizationType)
        self.require(
            self.encoder_reparameterization_type in kinds, "encoder_reparameterization_type", "'MLP' or 'LSTM'"
        )
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type)
        self.require_whole("encoder_hidden_size", none=True)
        self.require_whole("encoder_num_layers")
        self.require_share("encoder_dropout")

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
        if self.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
            return EncodedPrompt(site, MlpEncoder(*sizes, site.init_device))
        return EncodedPrompt(
            site, LstmEncoder(*sizes, site.init_device, layers=self.encoder_num_layers, dropout=self.encoder_dropout)
        )


class EncodedPrompt(LearnedEmbeddings, PromptModule):
    """Learned positions that a small network gives."""

    def virtual_embeddings(self) -> Tensor:
        """Return the learned positions `(n, hidden)`."""
        return self.get_embeddings()


class MlpEncoder(nn.Module):
    """`n` embeddings through three linear maps. Made in PEFT's order, so that one seed gives the same in both."""

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
    """`n` embeddings through an LSTM in both directions and two linear maps."""

    def __init__(self, n: int, hidden: int, h: int, device: torch.device, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, hidden, device=device)
        how: dict[str, Any] = {"bidirectional": True, "batch_first": True, "device": device}
        self.lstm_head = nn.LSTM(hidden, h, layers, dropout=dropout, **how)
        first, second = nn.Linear(2 * h, 2 * h, device=device), nn.Linear(2 * h, hidden, device=device)
        self.mlp_head = nn.Sequential(first, nn.ReLU(), second)

    def forward(self) -> Tensor:
        """Return `(n, hidden)`."""
        return self.mlp_head(self.lstm_head(self.embedding.weight[None])[0])[0]
