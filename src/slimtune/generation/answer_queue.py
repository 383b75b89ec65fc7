"""Answers that are asked for: how each is sampled, the pieces that arrive of it, and the queue of them."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import RunError, UsageError
from .answer_grammar import AnswerMatcher, CompiledGrammar
from .generation_models import GenerationModel
from .incremental_detokenizer import IncrementalDetokenizer
from .step_hang_detector import StepHangDetector

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-5
"""Lowest temperature at which a token is drawn; below it the answer is greedy, as in vLLM.

Logits that are divided by a tiny number become Inf, and their softmax NaN. The limit of the distribution is the most
likely token, so greedy is right and a client that sends 1e-10 for it gets no error. vLLM also raises temperatures from
1e-5 to 0.01 to 0.01; here logits are fp32, of which none up to 1e33 becomes Inf, and they are taken as they are.
"""

CLOSE_SECONDS = 3.0
"""How long a queue that is closed waits for the step that runs."""


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled.

    The next token is drawn from softmax(logits / temperature) over the whole vocabulary, or its likeliest part.

    Raises:
        UsageError: a setting is out of range.
    """

    max_new_tokens: int = 128  # most tokens of the answer, 1 or more
    temperature: float = 0.0  # 0: the most likely token (greedy), as below `MIN_TEMPERATURE`
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    seed: int = 0  # of the answer's own random numbers
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    top_logprobs: int | None = None  # likeliest tokens to report at each position; None: no log-probabilities
    logprobs_at_temperature: bool = False  # report log-probabilities at the temperature, not at 1
    grammar: CompiledGrammar | None = None  # that the answer matches; None: any text
    prompt_logprobs: int | None = None  # likeliest tokens to report at each token of the prompt; None: none at all

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "1 or more", "leave it out for 128")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}", "0 (greedy) or a number above it")
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)


class TokenLogprob(NamedTuple):
    """A token and its natural log-probability at temperature 1, and the likeliest tokens there with theirs.

    They are those of the model itself, whatever a grammar allows; at the temperature of sampling if asked for.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class PromptTokenLogprob(NamedTuple):
    """A token of a prompt, given those before it, and the likeliest tokens there with their log-probabilities."""

    token: int
    logprob: float
    rank: int  # 1: the likeliest
    top: list[tuple[int, float]]


class AnswerPiece(NamedTuple):
    """What a step adds to an answer."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of these tokens, if asked for
    finish_reason: str | None = None  # "stop" or "length" in the last piece
    error: BaseException | None = None  # of an answer that ends here without a finish reason


class QueueFull(RunError):
    """As many answers wait as may wait."""


class ServerClosing(RunError):
    """The server is shutting down."""


class GenerationThreadEnded(RunError):
    """The thread that generates answers has ended by an error."""


@dataclass(eq=False)
class GeneratedAnswer:
    """An answer that is asked for, and what is generated of it so far."""

    model: GenerationModel
    prompt_ids: Sequence[int]  # token ids
    params: SamplingParams
    send: Callable[[AnswerPiece], None] = lambda piece: None
    """Gets the pieces, in the thread that generates; it must not wait."""
    deadline: float = float("inf")  # by time.monotonic()
    cancelled: bool = False
    is_ended: bool = False  # the last piece has been sent, or an error
    num_tokens: int = 0  # generated so far, including the one that ends it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[PromptTokenLogprob] = field(default_factory=list)  # of all tokens but the first, if asked for
    finish_reason: str | None = None
    random: Any = None  # the torch.Generator of a sampled answer
    stream: IncrementalDetokenizer = field(init=False)
    matcher: AnswerMatcher | None = field(init=False)  # of an answer with a grammar

    def __post_init__(self) -> None:
        self.stream = IncrementalDetokenizer(self.model.tokenizer, self.params.stop)
        grammar = self.params.grammar
        self.matcher = None if grammar is None else grammar.start_answer()

    @property
    def text(self) -> str:
        """The text so far, without the tokens that end it."""
        return self.stream.text

    def add_piece(self, piece: AnswerPiece) -> None:
        """Add a piece to the answer and send it; an answer whose receiver raises an error is dropped."""
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason
        self.is_ended = piece.finish_reason is not None or piece.error is not None
        try:
            self.send(piece)
        except Exception as error:  # of one receiver; it must not end the answers of others
            self.cancelled = True
            log.exception("a piece of an answer could not be sent", exc_info=error)

    def end_if_dropped(self) -> bool:
        """Return whether the answer is cancelled or too late; one that is too late gets an error."""
        if not self.cancelled and time.monotonic() > self.deadline:
            self.cancelled = True
            self.add_piece(AnswerPiece(error=TimeoutError("the answer took too long")))
        return self.cancelled


class BaseAnswerQueue:
    """Answers that wait and run. A subclass generates them.

    Args:
        max_batch: most answers that are generated at the same time.
        max_waiting: most answers that wait.
    """

    masks_tokens = True
    """Whether grammars are compiled for the tokens of a model, and not for bytes."""
    scores_prompts = True
    """Whether it gives log-probabilities of prompts."""

    def __init__(self, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.finished, self.generated_tokens = 0, 0
        self._waiting: deque[GeneratedAnswer] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.hang_detector = StepHangDetector()
        self.failure: BaseException | None = None
        """What ended a thread that generates; the queue then takes no more answers."""

    def submit(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Generate these answers as soon as there is room for each.

        Raises:
            QueueFull: they would be more than may wait.
            ServerClosing, GenerationThreadEnded: no answer is generated any more.
        """
        with self._changed:
            if self.failure is not None:
                raise GenerationThreadEnded("the thread that generates answers has ended by an error")
            if self._is_closed:
                raise ServerClosing("the server is shutting down")
            if len(self._waiting) + len(answers) > self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} answers wait already", f"at most {self.max_waiting}")
            self._waiting.extend(answers)
            self._changed.notify_all()

    def cancel(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Drop answers that nobody wants any more; those that run end before the next token."""
        with self._changed:
            for answer in answers:
                answer.cancelled = True
            self._waiting = deque(answer for answer in self._waiting if not answer.cancelled)

    def _drop_unwanted_waiting(self) -> None:
        """Remove the waiting answers that are cancelled or too late.

        They get their error without the lock, which `submit` needs: a receiver that hangs must stop nobody else.
        """
        with self._changed:
            waiting = [*self._waiting]
        dropped = {answer for answer in waiting if answer.end_if_dropped()}
        if dropped:
            with self._changed:
                self._waiting = deque(answer for answer in self._waiting if answer not in dropped)

    def _end_all(self, running: Sequence[GeneratedAnswer], failure: BaseException) -> None:
        """End all answers with an error, because a thread that generates cannot go on."""
        log.critical("the thread that generates answers ends", exc_info=failure)
        with self._changed:
            self.failure, self._is_closed = failure, True
            answers = [*running, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for answer in answers:
            if not answer.is_ended:
                message = "the thread that generates answers has ended by an error"
                answer.add_piece(AnswerPiece(error=GenerationThreadEnded(message)))

    def count(self) -> dict[str, int]:
        """Return how many answers run and wait, and how many tokens the caches hold, padding included.

        It takes no lock, so that it returns whatever hangs; an answer that begins just now may count twice.
        """
        raise NotImplementedError

    def close(self) -> bool:
        """End the threads after the step that runs, or leave them if it lasts longer than `CLOSE_SECONDS`.

        Answers that are not finished get an error. Returns whether all threads have ended.
        """
        raise NotImplementedError
