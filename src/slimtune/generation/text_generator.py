"""One generator for all text: answers join and leave its batches at every token.

    waiting   →   prompt runs alone   →   a row of the shared batch, a token for each step   →   finished
    (bounded)     at most `PREFILL_TOKENS` for each step, so that rows in the batch go on

An adapter that cannot share a batch has a batch of its own for each row. All batches take a step in turn. Answers to
one prompt that wait together share its pass.

An error in a pass of several rows names no row. So all tokens of each row run again alone, in a cache of its own: the
row at fault fails again and its answer ends with the error, the others go on and soon share a batch again.

The steps run in a thread of the generator's own after `start` (the server), or else in the thread that reads the
answers (a command, an evaluation, a training).
"""

import logging
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from ..core.adapters.active_adapters import BASE_ROW
from ..core.foundation.device import release_unused_memory
from ..errors import AdapterError, ModelError, SlimtuneError, is_out_of_memory
from .answer_grammar import AnswerMatcher, GrammarError
from .answer_queue import CLOSE_SECONDS, AnswerPiece, BaseAnswerQueue, GeneratedAnswer, ServerClosing, TokenLogprob
from .model_runner import CachedBatch, GenerationRow, MultiAdapterRunner
from .prompt_scores import score_prompt

log = logging.getLogger(__name__)
T = TypeVar("T")

PREFILL_TOKENS = 1024
"""Tokens of new prompts that run between two steps of the batch; a longer prompt runs as a whole."""
STEPS_ALONE = 16
"""Steps after an error in a pass of several rows until its rows share a batch again."""
MAX_FAILURES = 3
"""Steps that may fail one after another, elsewhere than in a pass of the model, before the thread gives up."""


class DrawnTokens(NamedTuple):
    """The token that was drawn for each row, -1 for none, and its log p at the temperature if the answer reports it."""

    tokens: list[int]
    logps: list[float | None]


def draw_from(probabilities: Tensor, randoms: Sequence[torch.Generator]) -> Tensor:
    """Return a token for each row of `probabilities (rows, tokens)`, each with one random number of its generator.

    On a GPU, where sums are added in another order each time, torch.multinomial draws as many numbers as tokens.
    """
    if probabilities.device.type != "cpu":
        drawn = [torch.multinomial(p, 1, generator=random) for p, random in zip(probabilities, randoms, strict=True)]
        return torch.cat(drawn)
    sums = probabilities.double().cumsum_(-1)
    total = sums[:, -1:].contiguous()
    at = torch.stack([torch.rand(1, generator=random, dtype=torch.float64) for random in randoms]) * total
    # The first token whose sum is above the number has a probability above 0; rounding may bring it to the total.
    return torch.minimum(torch.searchsorted(sums, at, right=True), torch.searchsorted(sums, total))[:, 0]


class TextGenerator(BaseAnswerQueue):
    """Generates answers with the base and the adapters of one model, many at once.

    Args:
        adapted_model: in evaluation mode; nobody else may use it while answers are generated.
        max_batch: most answers that are generated at the same time.
        max_waiting: most answers that wait.
    """

    def __init__(self, adapted_model: Any, *, max_batch: int = 16, max_waiting: int = 1 << 20) -> None:
        super().__init__(max_batch, max_waiting)
        self.runner, self._cached_tokens = MultiAdapterRunner(adapted_model), 0
        self._running: dict[GenerationRow, GeneratedAnswer] = {}
        self._batches: list[CachedBatch] = []  # the shared one and those of single rows
        self._steps_since_error = STEPS_ALONE
        self._thread: threading.Thread | None = None
        self._changes: list[tuple[Callable[[], Any], Future[Any]]] = []

    def start(self) -> None:
        """Generate in a thread of its own from now on, until `close`."""
        self._thread = threading.Thread(target=self._run_steps, name="slimtune-generate", daemon=True)
        self._thread.start()

    def stream(self, answers: Sequence[GeneratedAnswer]) -> Generator[tuple[GeneratedAnswer, AnswerPiece], None, None]:
        """Yield the pieces of answers as they come; closing the iterator drops those that are not finished.

        An error of an answer is raised.
        """
        pieces: SimpleQueue[tuple[GeneratedAnswer, AnswerPiece]] = SimpleQueue()

        def put(answer: GeneratedAnswer, piece: AnswerPiece) -> None:
            pieces.put((answer, piece))

        for answer in answers:
            answer.send = partial(put, answer)
        self.submit(answers)
        unfinished = set(answers)
        try:
            while unfinished:
                while self._thread is None and pieces.empty():
                    self._step_in_this_thread()
                answer, piece = pieces.get()
                if piece.error is not None:
                    raise piece.error
                if piece.finish_reason:
                    unfinished.discard(answer)
                yield answer, piece
        finally:
            self.cancel([*unfinished])
            if self._thread is None:
                self._drop_unwanted()

    def _step_in_this_thread(self) -> None:
        try:
            self.step()
        except BaseException as error:
            # After Ctrl-C in a pass, some layers have keys and values of its tokens and others have not.
            self._end_with_error([*self._running], error)
            self._batches = []
            raise

    def generate(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Generate whole answers; errors are raised."""
        for _ in self.stream(answers):
            pass

    def change_between_steps(self, change: Callable[[], T]) -> T:
        """Run what changes the model between two steps, in the thread that generates; return or raise what it does.

        Raises:
            ServerClosing: no step is run any more.
        """
        done: Future[T] = Future()
        with self._changed:
            if self._is_closed or self._thread is None:
                raise ServerClosing("the server is shutting down")
            self._changes.append((change, done))
            self._changed.notify_all()
        return done.result()

    def is_answering(self, adapter_or_base: str) -> bool:
        """Return whether an answer of an adapter, or of the base, waits or runs."""
        with self._changed:
            answers = [*self._waiting, *self._running.values()]
        return any(answer.model.adapter_or_base == adapter_or_base for answer in answers)

    def _run_changes(self) -> None:
        with self._changed:
            changes, self._changes = self._changes, []
        for change, done in changes:
            try:
                done.set_result(change())
            except BaseException as error:
                done.set_exception(error)

    def count(self) -> dict[str, int]:
        waiting = len(self._waiting)  # first: none is missed that begins meanwhile
        return {"running": len(self._running), "waiting": waiting, "cached_tokens": self._cached_tokens}

    def close(self) -> bool:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        for answer in [*self._waiting, *self._running.values()]:
            if not answer.is_ended:
                answer.add_piece(AnswerPiece(error=ServerClosing("the server is shutting down")))
        return self._thread is None or not self._thread.is_alive()

    def step(self) -> None:
        """Run waiting prompts that there is room for, and then one token of every running answer.

        An error in a pass ends the answer it is about. Where the pass had several rows, each of them runs again alone.
        """
        self._admit()
        self._steps_since_error += 1
        if self._steps_since_error == STEPS_ALONE:
            batches, self._batches = self._batches, []
            for batch in batches:
                self._join_shared_batch(batch)
        for batch in [*self._batches]:
            rows = batch.rows
            try:
                self._drop_unwanted_rows(batch)
                if batch.rows:
                    num_tokens = batch.rows[0].length if batch.cache is None else len(batch.rows)
                    with self.hang_detector.measure_step(num_tokens):
                        self._add_tokens(batch, self.runner.decode(batch))
            except Exception as error:
                failure = error
            else:
                continue
            # Outside of `except`: what the failed pass has allocated can be freed now.
            batch.drop()
            self._end_or_run_alone(rows, failure)
        self._drop_empty_batches()

    def _run_steps(self) -> None:
        failures = 0  # one after another, in other places than a pass
        try:
            while True:
                self.hang_detector.stop()
                with self._changed:
                    while not (self._waiting or self._running or self._changes or self._is_closed):
                        self._changed.wait()
                    if self._is_closed:
                        return
                self._run_changes()
                self.hang_detector.start()
                try:
                    self.step()
                    failures = 0
                    continue
                except Exception as error:
                    if (failures := failures + 1) == MAX_FAILURES:
                        raise
                    failure = error
                self._run_alone([*self._running], failure)
        except BaseException as error:
            running = [*self._running.values()]
            self._running, self._batches, self._cached_tokens = {}, [], 0
            self._end_all(running, error)
        finally:
            for _, done in self._changes:
                done.set_exception(ServerClosing("the server is shutting down"))

    def _admit(self) -> None:
        """Run the prompts of waiting answers that there is room for."""
        tokens = 0
        while tokens < PREFILL_TOKENS and (rows := self._take_rows_with_one_prompt()):
            first = self._running[rows[0]]
            tokens += len(first.prompt_ids)
            try:
                with self.hang_detector.measure_step(len(first.prompt_ids)):
                    logits, batch = self._run_prompt(rows[0], first)
                    if rows[1:]:
                        batch.repeat(rows[1:])
                    self._add_tokens(batch, logits.expand(len(rows), -1))
            except Exception as error:
                failure = error
            else:
                self._join_shared_batch(batch)
                continue
            self._end_or_run_alone(rows, failure)

    def _run_prompt(self, row: GenerationRow, answer: GeneratedAnswer) -> tuple[Tensor, CachedBatch]:
        """Run a prompt, and what was generated after it; return the next token's logits, and a batch of this row.

        A prompt whose tokens are scored has an answer of one token, which needs no cache.
        """
        if answer.params.prompt_logprobs is None:
            return self.runner.prefill(row, answer.prompt_ids, answer.token_ids)
        answer.prompt_logprobs, logits = score_prompt(
            self.runner, row.adapter_or_base, answer.prompt_ids, answer.params.prompt_logprobs
        )
        return logits, CachedBatch(row, None)

    def _join_shared_batch(self, batch: CachedBatch) -> None:
        """Move the rows of a batch to the shared one, if they can share it; else it becomes a batch of its own."""
        if not batch.rows:
            return
        shares = self.runner.shares_batches
        shared = next((b for b in self._batches if shares(b.rows[0].adapter_or_base)), None)
        if shared is None or not shares(batch.rows[0].adapter_or_base):
            self._batches.append(batch)
            return
        rows = [*shared.rows, *batch.rows]
        try:
            shared.join(batch)
        except Exception as error:
            failure = error
        else:
            return
        shared.drop()
        batch.drop()
        self._run_alone(rows, failure)

    def _end_or_run_alone(self, rows: Sequence[GenerationRow], error: Exception) -> None:
        """End the answer of the only row of a failed pass; several rows run again alone, and the one at fault ends."""
        if len(rows) == 1:
            self._end_with_error(rows, error)
        else:
            self._run_alone(rows, error)

    def _run_alone(self, rows: Sequence[GenerationRow], error: Exception) -> None:
        """Run all tokens of rows again after an error, each in a batch of its own, and end those that fail alone.

        No part of a cache is used again: the error may have left keys and values of a token in some layers only.
        """
        self._log_unless_expected(error)
        log.warning("a step for %d answers failed, each runs again alone: %s", len(rows), error)
        traceback.clear_frames(error.__traceback__)  # it keeps the tensors of the failed pass in memory
        if is_out_of_memory(error):
            release_unused_memory(self.runner.model.device)
        self._steps_since_error, lost = 0, set(rows)
        self._batches = [b for b in self._batches if b.rows and lost.isdisjoint(b.rows)]
        for row in rows:
            with self._changed:
                answer = self._running.get(row)
                if answer is None or answer.is_ended or answer.cancelled:
                    self._running.pop(row, None)
                    continue
            try:
                with self.hang_detector.measure_step(len(answer.prompt_ids) + len(answer.token_ids)):
                    logits, batch = self._run_prompt(row, answer)
                    self._add_tokens(batch, logits)
                self._batches += [batch] if batch.rows else []
            except Exception as own_error:
                self._end_with_error([row], own_error)

    def _take_rows_with_one_prompt(self) -> list[GenerationRow]:
        """Let the next answer run, if there is room, and those behind it that share its prompt's pass."""
        self._drop_unwanted_waiting()
        with self._changed:
            rows: list[GenerationRow] = []
            while self._waiting and len(self._running) < self.max_batch:
                answer, first = self._waiting[0], self._running[rows[0]] if rows else None
                if first is not None and not (
                    (answer.model.adapter_or_base, answer.prompt_ids) == (first.model.adapter_or_base, first.prompt_ids)
                    and self.runner.shares_batches(answer.model.adapter_or_base)
                    and answer.params.prompt_logprobs is first.params.prompt_logprobs is None
                ):
                    break
                rows.append(GenerationRow(answer.model.adapter_or_base))
                self._running[rows[-1]] = self._waiting.popleft()
            return rows

    def _drop_unwanted(self) -> None:
        """Remove the rows of answers that are cancelled or too late."""
        for batch in self._batches:
            self._drop_unwanted_rows(batch)
        self._drop_empty_batches()

    def _drop_unwanted_rows(self, batch: CachedBatch) -> None:
        self._keep(batch, [not self._running[row].end_if_dropped() for row in batch.rows])

    def _drop_empty_batches(self) -> None:
        self._batches = [batch for batch in self._batches if batch.rows]
        self._cached_tokens = sum(len(batch.rows) * batch.width for batch in self._batches)

    def _keep(self, batch: CachedBatch, wanted: Sequence[bool]) -> None:
        """Remove the other rows of a batch."""
        if all(wanted):
            return
        with self._changed:
            for row, keep in zip(batch.rows, wanted, strict=True):
                if not keep:
                    del self._running[row]
        batch.keep([i for i, keep in enumerate(wanted) if keep])

    def _end_with_error(self, rows: Iterable[GenerationRow], error: BaseException) -> None:
        self._log_unless_expected(error)
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)
        for row in rows:
            with self._changed:
                answer = self._running.pop(row, None)
            if answer is not None and not answer.is_ended:
                answer.add_piece(AnswerPiece(error=error))

    def _log_unless_expected(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, SlimtuneError) and not is_out_of_memory(error):
            log.exception("a step of the model failed", exc_info=error)

    def _add_tokens(self, batch: CachedBatch, logits: Tensor) -> None:
        """Choose the next token of each row by `logits (rows, vocabulary)`, and remove the rows that are finished.

        An error about one row, its tokenizer's for instance, ends its answer.
        """
        likeliest = logits.argmax(-1).tolist()
        # The maximum is NaN if any logit is; single logits may be -Inf, which means that the token cannot come.
        is_finite = torch.isfinite(logits.amax(-1)).tolist()
        drawn = self._draw_tokens([self._running[row] for row in batch.rows], logits, is_finite)
        for i, row in enumerate(batch.rows):
            answer = self._running[row]
            try:
                if not is_finite[i]:
                    raise _make_not_finite_error(row.adapter_or_base)
                is_greedy = answer.params.temperature == 0
                if answer.matcher is not None:
                    row.next_token = self._choose_allowed_token(answer, answer.matcher, logits[i : i + 1])
                elif is_greedy:
                    row.next_token = likeliest[i]
                elif drawn.tokens[i] >= 0:
                    row.next_token = drawn.tokens[i]
                else:
                    row.next_token = self._draw_token(answer, logits[i : i + 1])
                known = drawn.logps[i] if row.next_token == drawn.tokens[i] else None
                piece = self._make_piece(answer, row.next_token, logits[i], known)
            except Exception as error:
                self._log_unless_expected(error)
                piece = AnswerPiece(error=error)
            answer.add_piece(piece)
        self._keep(batch, [not self._running[row].is_ended for row in batch.rows])

    def _choose_allowed_token(self, answer: GeneratedAnswer, matcher: AnswerMatcher, logits: Tensor) -> int:
        """Choose among the tokens that the answer's grammar allows, by `logits (1, vocabulary)`."""
        allowed = matcher.find_allowed_tokens(logits.shape[-1]).to(logits.device)
        scores = logits.index_select(1, allowed)
        if not len(allowed) or scores.amax() == float("-inf"):
            raise GrammarError("the model gives no probability to what the grammar allows")
        is_greedy = answer.params.temperature == 0
        return int(allowed[scores.argmax() if is_greedy else self._draw_token(answer, scores)])

    def _draw_tokens(
        self, answers: Sequence[GeneratedAnswer], logits: Tensor, is_finite: Sequence[bool]
    ) -> "DrawnTokens":
        """Draw a token for each answer that is sampled from all of `logits (rows, vocabulary)`, all rows at once."""
        plain = [
            i
            for i, answer in enumerate(answers)
            if is_finite[i] and answer.params.temperature > 0 and answer.params.top_p == 1 and answer.matcher is None
        ]
        drawn = DrawnTokens([-1] * len(answers), [None] * len(answers))
        if plain:
            scores = logits if len(plain) == len(answers) else logits[plain]
            temperatures = [answers[i].params.temperature for i in plain]
            if any(temperature != 1 for temperature in temperatures):
                scores = scores / logits.new_tensor(temperatures)[:, None]
            log_probs = scores.log_softmax(-1)
            tokens = draw_from(log_probs.exp(), [self._get_random(answers[i], logits) for i in plain])
            logps = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
            for i, token, logp in zip(plain, tokens.tolist(), logps, strict=True):
                drawn.tokens[i] = token
                drawn.logps[i] = logp if answers[i].params.logprobs_at_temperature else None
        return drawn

    def _draw_token(self, answer: GeneratedAnswer, logits: Tensor) -> int:
        """Draw a token from `logits (1, tokens)`, with random numbers of the answer's own."""
        scores = logits / answer.params.temperature
        if answer.params.top_p < 1:
            scores = TopPLogitsWarper(answer.params.top_p)(scores, scores)
        return int(draw_from(scores.softmax(-1), [self._get_random(answer, logits)]))

    def _get_random(self, answer: GeneratedAnswer, logits: Tensor) -> torch.Generator:
        if answer.random is None:
            answer.random = torch.Generator(logits.device).manual_seed(answer.params.seed)
        return answer.random

    def _make_piece(
        self, answer: GeneratedAnswer, token: int, logits: Tensor, logp: float | None = None
    ) -> AnswerPiece:
        """Return what a token adds to an answer; `logp` is its log p as the answer reports it, if that is known."""
        params = answer.params
        answer.num_tokens += 1
        self.generated_tokens += 1
        is_last = answer.num_tokens == params.max_new_tokens
        is_end = token in answer.model.end_tokens
        if answer.matcher is not None:
            is_end = is_end and answer.matcher.can_end  # such a token may be a part of the text, too
            if not is_end:
                answer.matcher.accept_token(token)
                is_end = answer.matcher.must_end
        reason = "stop" if is_end else "length" if is_last else None
        text = answer.stream.add(token, last=reason is not None)
        if answer.stream.is_stopped:
            reason = "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.top_logprobs == 0 and logp is not None:
            logprobs = (TokenLogprob(token, logp, []),)
        elif params.top_logprobs is not None:
            is_warm = params.logprobs_at_temperature and params.temperature > 0
            scores = logits / params.temperature if is_warm else logits
            log_probs = scores.log_softmax(-1).clamp_min(-9999.0)  # JSON has no -Inf
            values, ids = log_probs.topk(params.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            logprobs = (TokenLogprob(token, float(log_probs[token]), top),)
        self.finished += reason is not None
        return AnswerPiece(text, (token,), logprobs, reason)


def _make_not_finite_error(adapter: str) -> SlimtuneError:
    """Return the error about NaN or Inf: the most likely token would be any, often the one that ends the answer."""
    if adapter == BASE_ROW:
        return ModelError("the base computes NaN or Inf, and has no answer", "finite logits")
    hint = "take an older checkpoint, or train again with a lower learning rate"
    return AdapterError("the tuned model computes NaN or Inf, and has no answer", "finite logits", hint)
