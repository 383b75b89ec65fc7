"""Answers that are asked for: how each is generated, the pieces of text that arrive of it, and the queue of them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import RunError
from ..serving.served_models import ServedModel
from .model_runner import Row

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not one yet."""


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is generated."""

    max_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # likeliest tokens to report at each position; None: no log-probabilities


class TokenLogprob(NamedTuple):
    """A token and its natural log-probability, and the likeliest tokens there with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What a step adds to an answer."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop" or "length" in the last piece
    error: Exception | None = None  # of an answer that ends here without a finish reason


class TextStream:
    """The text of an answer that grows by a token at a time, up to a stop string.

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


class QueueFull(RunError):
    """As many requests wait as may wait."""


class ServerClosing(RunError):
    """The server is shutting down."""


@dataclass(eq=False)
class Answer:
    """An answer that is being generated.

    `send` gets its pieces, in a thread of the model; it must not wait.
    """

    model: ServedModel
    prompt: Sequence[int]
    params: SamplingParams
    send: Callable[[Piece], None]
    deadline: float = float("inf")  # by time.monotonic()
    tokens: int = 0  # generated so far
    is_cancelled: bool = False
    row: Row = field(init=False)
    text: TextStream = field(init=False)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.row = Row(self.model.adapter)
        self.text = TextStream(self.model.tokenizer, self.params.stop)


class AnswerQueue:
    """Answers that wait and run. A subclass generates them, in threads of its own.

    Args:
        max_batch: most answers that are generated at the same time.
        max_waiting: most answers that wait.
    """

    def __init__(self, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.finished, self.generated_tokens = 0, 0
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def submit(self, answers: Sequence[Answer]) -> None:
        """Generate these answers as soon as there is room for each.

        Raises:
            QueueFull: they would be more than may wait.
        """
        with self._changed:
            if self._is_closed:
                raise ServerClosing("the server is shutting down")
            if len(self._waiting) + len(answers) > self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} answers wait already", f"at most {self.max_waiting}")
            self._waiting.extend(answers)
            self._changed.notify_all()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Drop answers that nobody wants any more; those that run end before the next token."""
        with self._changed:
            for answer in answers:
                answer.is_cancelled = True

    def count(self) -> dict[str, int]:
        """Return how many answers run and wait, and how many tokens the caches hold, padding included."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads after the step that runs; answers that are not finished get an error."""
        raise NotImplementedError

    def _end_dropped(self, answer: Answer) -> bool:
        """Return whether an answer is cancelled or too late."""
        if not answer.is_cancelled and time.monotonic() > answer.deadline:
            answer.send(Piece(error=TimeoutError("the answer took too long")))
            answer.is_cancelled = True
        return answer.is_cancelled
