"""Answers that are asked for: how each is generated, the pieces that arrive of it, and the queue in which they wait."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import RunError
from .models import ServedModel
from .runner import Row
from .text_stream import TextStream


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
