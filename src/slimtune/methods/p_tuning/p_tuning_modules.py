"""P-tuning's adapter modules."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


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
            text = f"encoder_num_layers is {config.encoder_num_layers}, and the prompt encoder has 2 layers"
            warnings.warn(f"{text}: only an LSTM has another number", stacklevel=2)
        linears = [nn.Linear(*size, device=device) for size in sizes]
        self.mlp_head = nn.Sequential(linears[0], *(m for linear in linears[1:] for m in (nn.ReLU(), linear)))

    def compute_last_inputs(self) -> Tensor:
        """Return the inputs of the last linear layer `(n, h)`."""
        x = self.embedding.weight
        return self.mlp_head[:-1](x if self.lstm_head is None else self.lstm_head(x[None])[0][0])

    def forward(self) -> Tensor:
        """Return `(n, hidden)`."""
        return self.mlp_head[-1](self.compute_last_inputs())
