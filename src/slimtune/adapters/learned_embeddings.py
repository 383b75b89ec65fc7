"""What the files of prompt tuning, P-tuning and prefix tuning call `prompt_embeddings (n, width)`, and how it starts.

It is a parameter, or what a small network, the prompt encoder, gives. A file holds it in both cases; PEFT's holds it
alone, which is all that use needs. Ours holds the encoder's own tensors beside it (`prompt_encoder.…`), so that
training goes on as if it had never stopped. Read from a file without them, it is a parameter from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..errors import UsageError
from .base import AdapterModule, Site


class LearnedEmbeddings(AdapterModule):
    """Mixed into a delta that learns `prompt_embeddings`.

    Args:
        site: where.
        start: the parameter's start `(n, width)`, or the encoder: a module that gives them when called.
    """

    def __init__(self, site: Site, start: Tensor | nn.Module) -> None:
        super().__init__()
        if isinstance(start, nn.Module):
            self.prompt_encoder: nn.Module | None = start.to(site.device, site.dtype)
            self.register_parameter("prompt_embeddings", None)
        else:
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(start.detach().to(site.device, site.dtype, copy=True))

    def learned(self) -> Tensor:
        """Return `prompt_embeddings (n, width)`."""
        return self.prompt_embeddings if self.prompt_encoder is None else self.prompt_encoder()

    def tensors(self) -> dict[str, Tensor]:
        """Return what the parameters are, or what the encoder gives without dropout, and the encoder's own."""
        if self.prompt_encoder is None:
            return super().tensors()
        with torch.no_grad(), evaluating(self.prompt_encoder):
            return {"prompt_embeddings": self.learned(), **super().tensors()}

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Let the encoder go where a file holds only what it gave."""
        if self.prompt_encoder is None or any(k.startswith("prompt_encoder.") for k in given):
            return
        there = given.get("prompt_embeddings")
        now = self.tensors()["prompt_embeddings"]
        if there is not None and there.shape == now.shape:
            trains = any(p.requires_grad for p in self.parameters())
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(now, requires_grad=trains)


def token_ids(text: str, tokenizer: str, settings: dict[str, Any] | None) -> list[int]:
    """Return the tokens of a text, special ones included, by a tokenizer's name or folder.

    Raises:
        UsageError: there is no such tokenizer.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, **(settings or {}))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"tokenizer_name_or_path {tokenizer!r} gives no tokenizer: {str(e).splitlines()[0]}",
            "a folder with a tokenizer, or a Hub id that can be reached",
            "name the base's own folder; in a recipe, the model's name means the model's tokenizer",
        ) from None
    ids: list[int] = loaded(text)["input_ids"]
    return ids


@contextmanager
def frozen_base(model: Any) -> Iterator[Any]:
    """Give a model without its adapters, in evaluation mode and without gradients, for the length of the `with`."""
    alone = model.disable_adapter() if hasattr(model, "disable_adapter") and hasattr(model, "peft_config") else None
    with torch.no_grad(), evaluating(model), alone or nullcontext():
        yield model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each part of it back into its own after."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
