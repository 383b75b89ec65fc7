"""Memory that runs out in the middle of a run is an event, not its end: what failed is done again in smaller passes.

    work ─▶ fails ─▶ drop what it left, give memory back ─▶ room := half the largest pass ─▶ the same rows again
                                        one row a pass already ─▶ activation checkpointing ─▶ give up, resumable

The passes of a step share one normalisation (step.py), so another division of its rows gives the same gradient up to
rounding; batch, data order and learning rate stay. The work draws its random numbers from where the failed try began:
divided as before, it draws the very same ones. Divided anew, dropout falls on other inputs, as it would have had the
run begun with that room. The smaller room is kept for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from ..data.collator import Collator, Example
from ..errors import RunError
from ..kernels.dropout import get_rng_states, set_rng_states
from ..utils.formatting import format_bytes
from ..utils.memory import is_out_of_memory, release_cached_memory
from .memory_probe import peak_bytes

T = TypeVar("T")
EVENT = "out of memory"
"""What marks the line of such an event in metrics.jsonl."""
LESS = "a smaller data.max_seq_len, --dtype bf16 or a smaller base"
"""What takes less where nothing can be divided any more."""


@dataclass(frozen=True)
class OomInfo:
    """One try that ran out of memory.

    Args:
        error: the first line of what was raised; nothing else of it is kept, since a traceback holds a whole pass.
        held_bytes: most held at once until then: reserved by the GPU's allocator, or resident in this process.
    """

    error: str
    held_bytes: int


@dataclass(frozen=True)
class OomEvent:
    """What became of a shortage.

    Args:
        step: optimizer steps done before it.
        where: what was being done.
        tokens: of the largest pass of what was being done, as laid; None: there were no passes.
        rows: in that pass.
        room_before: most tokens in one pass until then.
        room_after: from then on.
        checkpointing: whether activations are computed twice from then on.
        held_bytes: most held at once until then.
        planned_bytes: what was planned at most; None: there was no plan.
        error: what was raised.
    """

    step: int
    where: str
    tokens: int | None
    rows: int | None
    room_before: int | None
    room_after: int | None
    checkpointing: bool
    held_bytes: int
    planned_bytes: int | None
    error: str

    def text(self) -> str:
        """Return it as a line for people."""
        size = f", {self.tokens} tokens in {self.rows} row{'s' * (self.rows != 1)} at once" if self.tokens else ""
        then = "it is done again"
        if self.room_after != self.room_before:
            then += f" with at most {self.room_after} tokens in one pass"
        elif self.tokens:
            then += " with activation checkpointing"
        return f"after step {self.step} memory ran out in {self.where}{size} ({self.held()}): {then}"

    def held(self) -> str:
        """Return what was held beside what was planned."""
        line = f"{format_bytes(self.held_bytes)} were held"
        if self.planned_bytes is None:
            return line
        over = self.held_bytes - self.planned_bytes
        if over > 0:
            return f"{line}, {format_bytes(over)} ({over / self.planned_bytes:.0%}) more than were planned"
        return f"{line}, {format_bytes(self.planned_bytes)} were planned: the rest was not to be had here"

    def to_dict(self) -> dict[str, Any]:
        """Return it as a line of metrics.jsonl."""
        return {"event": EVENT, **asdict(self), "text": self.text()}


class OomRecovery:
    """Does work again, in smaller passes, where memory ran out.

    Args:
        collator: divides rows into passes; its `room` and `rows` get smaller.
        device: where the model lies.
        say: told what a person should know.
        note: given each event as plain values.
        checkpoint: turns activation checkpointing on; None: it is on, or the model has none.
        planned_bytes: what was planned to be held at most.
        agreed: asked after each try in passes whether it counts as failed, given whether it ran out of memory in this
            process; several ask each other here. None: they cannot, and where one fails the run ends.

    Attributes:
        checkpointing: whether it was turned on here.
        step: optimizer steps done, for the events.
        way_on: saves what can be saved before the run ends, and says how to go on.
    """

    def __init__(
        self,
        collator: Collator,
        device: torch.device,
        say: Callable[[str], None],
        note: Callable[[dict[str, Any]], None],
        *,
        checkpoint: Callable[[], Any] | None = None,
        planned_bytes: int | None = None,
        agreed: Callable[[bool], bool] | None = bool,
    ) -> None:
        self.collator, self.device, self.say, self.note = collator, device, say, note
        self.checkpoint, self.planned_bytes, self.agreed = checkpoint, planned_bytes, agreed
        self.checkpointing = False
        self.step = 0
        self.way_on: Callable[[], str] = lambda: ""

    def passes(
        self, where: str, rows: Sequence[Example], work: Callable[[], T], undo: Callable[[], Any], *, grad: bool = True
    ) -> T:
        """Return what `work` gives, divided into as small passes as it takes.

        Args:
            where: what is done, for the event.
            rows: the rows that `work` lays by the collator.
            work: may be called any number of times; lays `rows` anew each time.
            undo: drops what a failed try left.
            grad: whether passes are run backwards: only then does checkpointing save anything.

        Raises:
            RunError: a single row does not fit.
        """
        while True:
            done, short = self._tried(work, undo, self.agreed or bool)
            if short is None:
                return done  # type: ignore[return-value]
            if self.agreed is None:
                raise self.exhausted(where, short, where)
            before = self.collator.room
            tokens, count = self._largest(rows)
            if count > 1:
                self.collator.room = tokens // 2
                if not self.collator.packing:
                    self.collator.rows = count // 2
            elif grad and self.checkpoint is not None:
                self.turn_on()
            else:
                raise self.exhausted(where, short, f"{tokens} tokens of one row")
            self._tell(where, short, tokens, count, before)

    def again(self, where: str, work: Callable[[], T], undo: Callable[[], Any] | None) -> T:
        """Return what `work` gives, which has no passes: it is tried once more with what could be given back.

        Args:
            where: what is done, for the event.
            work: may be called twice.
            undo: drops what a failed try left; called once. None: nothing can, so there is one try.

        Raises:
            RunError: memory ran out then, too.
        """
        done, short = self._tried(work, undo or (lambda: None))
        if short is not None and undo is not None:
            self._tell(where, short, None, None, self.collator.room)
            done, short = self._tried(work, lambda: None)
        if short is not None:
            raise self.exhausted(where, short, where)
        return done  # type: ignore[return-value]

    def turn_on(self) -> None:
        """Turn activation checkpointing on, where it is not."""
        if self.checkpoint is not None:
            self.checkpoint()
            self.checkpoint, self.checkpointing = None, True

    def _tried(
        self, work: Callable[[], T], undo: Callable[[], Any], agreed: Callable[[bool], bool] = bool
    ) -> tuple[T | None, OomInfo | None]:
        """Return what `work` gives, or how memory ran out; then nothing is left of the try but that."""
        found: T | None = None
        short: OomInfo | None = None
        start = get_rng_states(self.device)
        try:
            found = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short = self.shortage(error)
        # Past the `except`: there the error is gone, and with it the frames that held the failed pass.
        failed = agreed(short is not None) or short is not None
        if not failed:
            return found, None
        del found
        undo()
        release_cached_memory(self.device)
        set_rng_states(start)
        return None, short or OomInfo("memory ran out in another process", peak_bytes(self.device, reserved=True))

    def _largest(self, rows: Sequence[Example]) -> tuple[int, int]:
        """Return the tokens of the largest pass, as laid, and its rows."""
        groups = self.collator.groups(rows)
        sizes = [self.collator([rows[i] for i in group])["input_ids"].numel() for group in groups]
        # Of equal ones the one of more rows: it can be divided.
        return max((size, len(group)) for size, group in zip(sizes, groups, strict=True))

    def shortage(self, error: BaseException) -> OomInfo:
        """Return what is kept of an error."""
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return OomInfo(f"{type(error).__name__}: {line}"[:300], peak_bytes(self.device, reserved=True))

    def _tell(self, where: str, short: OomInfo, tokens: int | None, rows: int | None, before: int | None) -> None:
        event = OomEvent(
            self.step,
            where,
            tokens,
            rows,
            before,
            self.collator.room,
            self.checkpointing,
            short.held_bytes,
            self.planned_bytes,
            short.error,
        )
        self.say(event.text())
        self.note(event.to_dict())

    def exhausted(self, where: str, short: OomInfo, what: str) -> RunError:
        """Return the error that ends the run, after saving what can be saved."""
        held = format_bytes(short.held_bytes)
        return RunError(
            f"there is not enough memory for {what} ({where} after step {self.step}; {held} were held): {short.error}",
            "memory that no other process holds, or less to hold",
            self.way_on() or LESS,
        )
