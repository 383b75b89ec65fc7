"""LoRA of modules that are tied to the input embedding (`ensure_weight_tying`): they share the embedding's A and B.

    embedding              E' = E + s · B A        A (r, rows), B (dim, r)
    tied embedding         the same A and B
    tied linear layer      y = x E'ᵀ: its A is Bᵀ (r, dim), its B is Aᵀ (rows, r)

One pair of matrices gets the gradients of all uses, and the modules stay tied after a merge. (PEFT makes two parameters
that share memory, so that an optimizer moves it twice.) File format: PEFT's, a copy under each module's name.
"""

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from ...adapters.base import BaseForward, Site
from ...kernels.dropout import active_dropout_p, dropout
from ...kernels.low_rank import add_low_rank
from .layers import EmbeddingLora, LoraModule


class TiedLora(LoraModule):
    """What both kinds share: no parameters of its own, and the owner in a tuple, so that it is registered once."""

    owner_tuple: tuple[EmbeddingLora]

    def __init__(self, site: Site, config: Any, owner: EmbeddingLora) -> None:
        super().__init__(site, config, owner.r, owner.scale)
        self.owner_tuple = (owner,)

    @property
    def owner(self) -> EmbeddingLora:
        return self.owner_tuple[0]

    @property
    def r(self) -> int:
        return self.owner.r


class TiedLinearLora(TiedLora):
    """`y + s · Aᵀ Bᵀ dropout(x)` with the embedding's A and B, for a linear layer whose weight is the embedding's."""

    peft_values: ClassVar = {**TiedLora.peft_values, "lora_A": "lora_A", "lora_B": "lora_B"}
    peft_modules: ClassVar[Collection[str]] = ("lora_A", "lora_B")

    def __init__(self, site: Site, config: Any, owner: EmbeddingLora) -> None:
        super().__init__(site, config, owner)
        self.lora_dropout = dropout(config.lora_dropout)

    @property
    def lora_A(self) -> Tensor:
        return self.owner.lora_embedding_B.t()

    @property
    def lora_B(self) -> Tensor:
        return self.owner.lora_embedding_A.t()

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        return base.plus_low_rank(x, self.lora_A, self.lora_B, self.scale, active_dropout_p(self.lora_dropout))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The product of the embedding, so that both round to the same weight.
        return add_low_rank(weight.t(), *self.owner.low_rank(), self.scale).t(), bias

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


class TiedEmbeddingLora(TiedLora):
    """An embedding with the update of the input embedding."""

    peft_values: ClassVar = {
        **TiedLora.peft_values, "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"
    }  # fmt: skip

    @property
    def lora_embedding_A(self) -> nn.Parameter:
        return self.owner.lora_embedding_A

    @property
    def lora_embedding_B(self) -> nn.Parameter:
        return self.owner.lora_embedding_B

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.owner.low_rank()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.owner.forward(x, y)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}
