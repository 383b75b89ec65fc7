"""The text of an answer that grows by a token at a time, up to a stop string."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not one yet."""


class IncrementalDetokenizer:
    """The text of an answer, and the pieces of it that may be sent.

    The pieces joined are what `tokenizer.decode` makes of all tokens at once. Text that may be the beginning of a stop
    string, or of a character, is held back until the next tokens decide.

    Args:
        tokenizer: special tokens are left out of the text.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""  # up to the last complete character, or the stop string
        self.is_stopped = False
        self._ids: list[int] = []
        # A tokenizer may write a token differently at the beginning of a text, so that the tokens of the last complete
        # character are decoded again before the new ones: `_ids[_context:_done]`.
        self._context = self._done = self._sent = 0

    def add(self, token: int, *, last: bool = False) -> str:
        """Return the piece of text that a token completes; `last` means that no token follows."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._done])
        new = self._decode(self._ids[self._context :])[len(before) :]
        if not last and new.endswith(INCOMPLETE):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return self.add_text(new, last=last)

    def add_text(self, new: str, *, last: bool = False) -> str:
        """Return the piece of text that can be sent once `new`, complete characters, follows."""
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += new
        found = [at for at in (self.text.find(s, searched) for s in self.stop) if at >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        end = len(self.text) if last or self.is_stopped else len(self.text) - self._held_back()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _held_back(self) -> int:
        """Return how many characters at the end of the text are the beginning of a stop string."""
        lengths = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        return max(lengths, default=0)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
