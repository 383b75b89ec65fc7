"""A model in this process: the adapted model as it was trained, or a merged folder loaded back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import Scores


class Transformers:
    """A model that transformers runs.

    Args:
        name: as tables show it.
        model: adapted or plain, in evaluation mode.
        tokenizer: its own.
        likely: how many of the likeliest tokens `scores` gives.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, likely: int = 64) -> None:
        self.name, self.model, self.tokenizer, self.likely = name, model, tokenizer, likely

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; a chat template writes its own beginning of text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def table(self, ids: Sequence[int]) -> Tensor:
        """Return log p of every token at each position but the last, `(n - 1, vocabulary)`, float64."""
        given = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=given, use_cache=False).logits[0, :-1].double().log_softmax(-1).cpu()

    def scores(self, ids: Sequence[int]) -> Scores:
        """Return log p of each token of a text but the first."""
        table = self.table(ids)
        values, likely = table.topk(min(self.likely, table.shape[1]))
        return Scores(table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], likely, values)

    @torch.no_grad()
    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest continuation, token by token, without its end-of-text."""
        given = torch.tensor([ids], device=self.model.device)
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        settings |= {"repetition_penalty": 1.0, "max_new_tokens": most, "attention_mask": torch.ones_like(given)}
        found = self.model.generate(given, **settings)[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        return found[:-1] if found and found[-1] in ends else found

    def close(self) -> None:
        """Let go of the model."""
        self.model = None
