"""The thread that owns the model. Requests join and leave its batches at every token.

    waiting   →   prompt runs alone   →   a row of the shared batch, a token for each step   →   finished
    (bounded)     at most `PREFILL_TOKENS` for each step, so that rows in the batch go on

An adapter that cannot share a batch has a batch of its own for each row. All batches take a step in turn.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from ..core.adapters.active_adapters import BASE_ROW
from ..errors import SlimtuneError, is_out_of_memory
from .answers import Answer, AnswerQueue, Piece, ServerClosing, TokenLogprob
from .generator import RequireFiniteLogits
from .model_runner import Batch, ModelRunner, Row

log = logging.getLogger(__name__)

PREFILL_TOKENS = 1024
"""Tokens of new prompts that run between two steps of the batch; a longer prompt runs as a whole."""


class ContinuousBatching(AnswerQueue):
    """Generates answers for many requests at once, in a thread of its own.

    Args:
        runner: the model; no other thread may use it.
        max_batch: most answers that are generated at the same time.
        max_waiting: most answers that wait.
    """

    def __init__(self, runner: ModelRunner, *, max_batch: int, max_waiting: int) -> None:
        super().__init__(max_batch, max_waiting)
        self.runner, self._cached_tokens = runner, 0
        self._running: dict[Row, Answer] = {}
        self._batches: list[Batch] = []  # the shared one and those of single rows
        self._thread = threading.Thread(target=self._run, name="slimtune-serve", daemon=True)
        self._thread.start()

    def count(self) -> dict[str, int]:
        with self._changed:
            counts = {"running": len(self._running), "waiting": len(self._waiting)}
            return {**counts, "cached_tokens": self._cached_tokens}

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    unfinished = [*self._waiting, *self._running.values()]
                    break
            self._admit()
            for batch in list(self._batches):
                self._keep(batch, [not self._end_dropped(self._running[row]) for row in batch.rows])
                if batch.rows:
                    self._step(batch)
            self._batches = [batch for batch in self._batches if batch.rows]
            self._cached_tokens = sum(len(batch.rows) * batch.width for batch in self._batches)
        for answer in unfinished:
            answer.send(Piece(error=ServerClosing("the server is shutting down")))

    def _admit(self) -> None:
        """Run the prompts of waiting answers that there is room for."""
        tokens = 0
        while tokens < PREFILL_TOKENS:
            with self._changed:
                self._waiting = deque(a for a in self._waiting if not self._end_dropped(a))
                if not self._waiting or len(self._running) >= self.max_batch:
                    return
                answer = self._waiting.popleft()
                self._running[answer.row] = answer
            tokens += len(answer.prompt)
            try:
                logits, batch = self.runner.prefill(answer.row, answer.prompt)
            except Exception as error:
                self._end_all([answer.row], error)
                continue
            self._add_tokens(batch, logits)
            if batch.rows and self.runner.shares_batches(answer.model.adapter):
                shared = next((b for b in self._batches if self.runner.shares_batches(b.rows[0].adapter)), None)
                if shared is not None:
                    shared.join(batch)
                    continue
            if batch.rows:
                self._batches.append(batch)

    def _step(self, batch: Batch) -> None:
        try:
            logits = self.runner.decode(batch)
        except Exception as error:
            self._end_all(batch.rows, error)
            batch.rows = []
            return
        self._add_tokens(batch, logits)

    def _keep(self, batch: Batch, wanted: Sequence[bool]) -> None:
        """Remove the other rows of a batch."""
        if all(wanted):
            return
        kept = [i for i, keep in enumerate(wanted) if keep]
        with self._changed:
            for row, keep in zip(batch.rows, wanted, strict=True):
                if not keep:
                    del self._running[row]
        if kept:
            batch.keep(kept)
        else:
            batch.rows, batch.cache = [], None

    def _end_all(self, rows: Sequence[Row], error: Exception) -> None:
        if not isinstance(error, SlimtuneError) and not is_out_of_memory(error):
            log.exception("a step of the model failed", exc_info=error)
        for row in rows:
            with self._changed:
                answer = self._running.pop(row)
            answer.send(Piece(error=error))

    def _add_tokens(self, batch: Batch, logits: Tensor) -> None:
        """Choose the next token of each row by `logits (rows, vocabulary)`, and remove the rows that are finished."""
        likeliest = logits.argmax(-1).tolist()
        # The maximum is NaN if any logit is; single logits may be -Inf.
        is_finite = torch.isfinite(logits.amax(-1)).tolist()
        goes_on = []
        for i, row in enumerate(batch.rows):
            answer = self._running[row]
            if is_finite[i]:
                token = likeliest[i] if answer.params.temperature == 0 else self._sample(answer, logits[i : i + 1])
                goes_on.append(self._add_token(answer, token, logits[i]))
                continue
            try:
                RequireFiniteLogits(row.adapter != BASE_ROW)(logits[i : i + 1], logits[i : i + 1])
            except SlimtuneError as error:
                answer.send(Piece(error=error))
            goes_on.append(False)
        self._keep(batch, goes_on)

    def _sample(self, answer: Answer, logits: Tensor) -> int:
        """Draw a token as transformers' `generate` does, with a generator of the answer's own."""
        if answer.generator is None:
            answer.generator = torch.Generator(logits.device).manual_seed(answer.params.seed)
        scores = logits / answer.params.temperature
        if answer.params.top_p < 1:
            scores = TopPLogitsWarper(answer.params.top_p)(scores, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=answer.generator))

    def _add_token(self, answer: Answer, token: int, logits: Tensor) -> bool:
        """Send what a token adds to an answer; return whether the answer goes on."""
        params = answer.params
        answer.tokens += 1
        answer.row.next_token = token
        self.generated_tokens += 1
        reason = (
            "stop" if token in answer.model.end_tokens else "length" if answer.tokens == params.max_tokens else None
        )
        text = answer.text.add(token, last=reason is not None)
        if answer.text.is_stopped:
            reason = "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.top_logprobs is not None:
            log_probs = logits.log_softmax(-1).clamp_min(-9999.0)  # JSON has no -Inf
            values, ids = log_probs.topk(params.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            logprobs = (TokenLogprob(token, float(log_probs[token]), top),)
        if reason:
            self.finished += 1
        answer.send(Piece(text, logprobs, reason))
        return reason is None
