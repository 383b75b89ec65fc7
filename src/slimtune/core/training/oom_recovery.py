"""Recovery from running out of memory in the middle of a run: the failed work is repeated in smaller micro-batches.

    work fails ─▶ drop what it left, release memory ─▶ halve the largest micro-batch ─▶ repeat the same rows
                             already one row per micro-batch ─▶ activation checkpointing ─▶ give up, resumable

The micro-batches of a step share one normalization (loss.py), so the gradient stays the same up to rounding;
batch, order of the rows and learning rate stay, too. The repeated work draws the random numbers of the failed try; if
it is divided differently, dropout meets other inputs, as it would have if the run had begun with that size. The smaller
size is kept for the rest of the run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from ...errors import RunError, is_out_of_memory
from ..data.collator import Collator, Example
from ..foundation import distributed
from ..foundation.device import count_peak_memory, release_unused_memory
from ..foundation.formatting import format_bytes
from ..kernels.dropout import get_rng_states, set_rng_states

T = TypeVar("T")
EVENT = "out of memory"
"""Value of `event` in the lines of metrics.jsonl about running out of memory."""
LESS_MEMORY = "a smaller data.max_seq_len, --dtype bf16 or a smaller base"
"""What takes less memory when the micro-batches cannot get smaller."""


class _FailedTry(NamedTuple):
    """One try that ran out of memory: the first line of its error, and the most bytes in use until then.

    The error itself is not kept, since its traceback keeps tensors alive.
    """

    error: str
    held_bytes: int


def make_peer_failure_check(model: Any) -> Callable[[bool], bool] | None:
    """Return the function by which a process learns that another one failed; None for a base that FSDP2 shards.

    There the others wait inside the failed pass for its weights, and cannot repeat it.
    """
    return None if isinstance(model, FSDPModule) else distributed.any_process_true


class OomRecovery:
    """Repeats work that ran out of memory.

    Args:
        collator: divides rows into micro-batches; its limits get smaller.
        device: the device of the model.
        logger: `say(text)` prints a line for people, `record(event)` gets each event as plain values.
        enable_checkpointing: turns activation checkpointing on; None: it is on, or the model does not support it.
        planned_bytes: most bytes that were planned.
        any_failed: called after each try in micro-batches with whether it failed here; returns whether it failed in
            any process. None: the processes cannot recover together, and a failure in one ends the run.

    Attributes:
        checkpointing: whether activation checkpointing was turned on here.
        step: optimizer steps done, for the events.
        save_before_exit: saves what can be saved before the run ends; returns how to continue, "" if nothing is saved.
    """

    def __init__(
        self,
        collator: Collator,
        device: torch.device,
        logger: Any,
        *,
        enable_checkpointing: Callable[[], Any] | None = None,
        planned_bytes: int | None = None,
        any_failed: Callable[[bool], bool] | None = distributed.any_process_true,
    ) -> None:
        self.collator, self.device, self.logger = collator, device, logger
        self._enable_checkpointing, self.any_failed = enable_checkpointing, any_failed
        self.planned_bytes = planned_bytes
        self.checkpointing = False
        self.step = 0
        self.save_before_exit: Callable[[], str] = str

    def run_in_micro_batches(
        self, where: str, rows: Sequence[Example], work: Callable[[], T], undo: Callable[[], Any], *, grad: bool = True
    ) -> T:
        """Return what `work` returns; repeat it in smaller micro-batches while it runs out of memory.

        Args:
            where: what is done, for the event.
            rows: the rows that `work` divides with the collator.
            work: may be called any number of times; divides `rows` each time.
            undo: drops what a failed try left.
            grad: whether there are backward passes: only then does activation checkpointing save memory.
        """
        while True:
            result, oom = self._try(work, undo, self.any_failed or bool)
            if oom is None:
                return result  # type: ignore[return-value]
            if self.any_failed is None:
                raise self.give_up(where, oom, where)
            groups = self.collator.group_rows(rows)
            sizes = [self.collator([rows[i] for i in group])["input_ids"].numel() for group in groups]
            # Among equal sizes take the micro-batch with more rows: it can be divided.
            tokens, count = max((size, len(group)) for size, group in zip(sizes, groups, strict=True))
            limit = self.collator.max_tokens
            if count > 1:
                self.collator.max_tokens = tokens // 2
                if not self.collator.packing:
                    self.collator.max_rows = count // 2
                change = f" with at most {tokens // 2} tokens in a micro-batch"
            elif grad and self._enable_checkpointing is not None:
                self.enable_checkpointing()
                change = " with activation checkpointing"
            else:
                raise self.give_up(where, oom, f"{tokens} tokens of one row")
            size = f", {tokens} tokens in {count} row{'s' * (count != 1)}"
            self._report(where, oom, size, change, tokens=tokens, rows=count, max_tokens_before=limit)

    def retry_once(self, where: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, which has no micro-batches; if it runs out of memory, call it once more."""
        result, oom = self._try(work)
        if oom is not None:
            self._report(where, oom, tokens=None, rows=None, max_tokens_before=self.collator.max_tokens)
            result, oom = self._try(work)
        if oom is not None:
            raise self.give_up(where, oom, where)
        return result  # type: ignore[return-value]

    def enable_checkpointing(self) -> None:
        """Turn activation checkpointing on, if it is off."""
        if self._enable_checkpointing is not None:
            self._enable_checkpointing()
            self._enable_checkpointing, self.checkpointing = None, True

    def describe(self, error: BaseException) -> _FailedTry:
        """Return what is kept of an error."""
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return _FailedTry(f"{type(error).__name__}: {line}"[:300], count_peak_memory(self.device, reserved=True))

    def give_up(self, where: str, oom: _FailedTry, what: str) -> RunError:
        """Save what can be saved; return the error that ends the run."""
        used = format_bytes(oom.held_bytes)
        saved = self.save_before_exit()
        return RunError(
            f"there is not enough memory for {what} ({where} after step {self.step}; {used} were in use): {oom.error}",
            "more free memory, or a run that needs less",
            f"free memory, then resume: {saved}; or start again with {LESS_MEMORY}" if saved else LESS_MEMORY,
            code="system-memory",
        )

    def _try(
        self, work: Callable[[], T], undo: Callable[[], Any] = lambda: None, any_failed: Callable[[bool], bool] = bool
    ) -> tuple[T | None, _FailedTry | None]:
        """Return what `work` returns, or what is known of its running out of memory, of which then nothing is left."""
        result: T | None = None
        oom: _FailedTry | None = None
        rng_states = get_rng_states(self.device)
        try:
            result = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            oom = self.describe(error)
        # Outside of `except`: there the error is freed, and with it the frames that keep the failed pass alive.
        failed = any_failed(oom is not None) or oom is not None
        if not failed:
            return result, None
        del result
        undo()
        release_unused_memory(self.device)
        set_rng_states(rng_states)
        return None, oom or _FailedTry(
            "another process ran out of memory", count_peak_memory(self.device, reserved=True)
        )

    def _report(self, where: str, oom: _FailedTry, size: str = "", change: str = "", **facts: int | None) -> None:
        used, planned = f"{format_bytes(oom.held_bytes)} were in use", self.planned_bytes
        if planned is not None and oom.held_bytes > planned:
            excess = oom.held_bytes - planned
            used += f", {format_bytes(excess)} ({excess / planned:.0%}) more than were planned"
        elif planned is not None:
            used += f", {format_bytes(planned)} were planned: other processes use the rest"
        text = f"after step {self.step} memory ran out in {where}{size} ({used}): repeating it{change}"
        self.logger.say(text)
        event = {"event": EVENT, "step": self.step, "where": where, **oom._asdict(), "planned_bytes": planned, **facts}
        after = {"max_tokens_after": self.collator.max_tokens, "checkpointing": self.checkpointing}
        self.logger.record({**event, **after, "text": text})
