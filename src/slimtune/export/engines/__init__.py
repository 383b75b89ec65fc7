"""What can say how likely a text is: the trained adapter, and each engine that may serve an export of it.

transformers.py    the adapted model as trained, a merged folder
llama_cpp.py       a GGUF, with an adapter's GGUF beside it
vllm.py            a vLLM server, by its HTTP interface
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What an engine says of the tokens of one text but its first, each given those before it; natural logarithms.

    Args:
        own: log p of the token that comes next `(n - 1)`, float64.
        likely: the ids of the likeliest tokens at each position `(n - 1, k)`.
        values: their log p `(n - 1, k)`, float64.
    """

    own: Tensor
    likely: Tensor
    values: Tensor


class Engine(Protocol):
    """A model as something serves it."""

    name: str
    """As tables show it: "merged folder", "llama.cpp", "vLLM"."""

    def tokens(self, text: str) -> list[int]:
        """Return the ids the engine itself makes of a rendered prompt, its beginning of text included."""
        ...

    def scores(self, ids: Sequence[int]) -> Scores:
        """Return log p of each token of a text but the first."""
        ...

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest continuation of a prompt, token by token, without its end-of-text."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...
