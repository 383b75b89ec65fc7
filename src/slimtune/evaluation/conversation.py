"""A conversation with base and tuned model: what `slimtune chat` and the chat of the web page hold."""

from __future__ import annotations

from collections.abc import Generator as Pieces
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch
    from .generate import Generator, Message


class Conversation:
    """A conversation with base and tuned model, each of which remembers its own answers.

    The base must not continue what the tuned model said.
    """

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        self.generator = generator
        start = [{"role": "system", "content": system}] if system else []
        self.messages: dict[str, list[Message]] = {"base": [*start], "tuned": [*start]}

    def stream(self, text: str, model: str, **settings: Any) -> Pieces[str, None, None]:
        """Yield the pieces of the answer of the model "base" or "tuned" to a text of the user, and remember both.

        Settings and errors are those of `Generator.stream`.
        """
        history = self.messages[model]
        history.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self.generator.stream(history, tuned=model == "tuned", **settings):
                answer += piece
                yield piece
        finally:
            if answer:
                history.append({"role": "assistant", "content": answer})
            else:
                history.pop()
