"""Whether a step of the model lasts so much longer than the others that it seems to hang."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

MIN_HANG_SECONDS, HANG_FACTOR = 60.0, 10
"""A step hangs after this time at the earliest, and after this many times the time that its tokens should take."""
SHORT_STEP_TOKENS = 64
"""Tokens of a step whose time hardly depends on their number: a token for each row of a batch, or a short prompt."""
ASSUMED_SECONDS_PER_TOKEN = 0.1
"""Of a prompt, until a step has been measured."""


class StepHangDetector:
    """Measures the steps of a thread, so that another thread can ask whether the present one hangs.

    A step of n tokens should take as long as the slowest short step, and n times the time of a token in the step with
    the most tokens per second. A step that hung for a time and ended does not count as measured.
    """

    def __init__(self) -> None:
        self._started: float | None = None  # by time.monotonic(); None: no step runs
        self._num_tokens, self._is_measured = 0, False
        self._slowest_short, self._seconds_per_token = 0.0, float("inf")

    def start(self, num_tokens: int = 0) -> None:
        """Begin a step that computes so many tokens; 0: other work, which is not measured."""
        self._num_tokens, self._is_measured, self._started = num_tokens, num_tokens > 0, time.monotonic()

    def add_tokens(self, num_tokens: int) -> None:
        """Let the step compute more tokens than it began with; it is not measured then."""
        self._num_tokens += num_tokens
        self._is_measured = False

    def finish(self) -> None:
        """End the step, and measure it."""
        if self._started is not None and self._is_measured:
            self.record(time.monotonic() - self._started, self._num_tokens)
        self.stop()

    def stop(self) -> None:
        """End the step, whose time says nothing about others: nothing is to be done, or it failed."""
        self._started = None

    @contextmanager
    def measure_step(self, num_tokens: int) -> Iterator[None]:
        """Run the block as a step of so many tokens; what follows is other work."""
        self.start(num_tokens)
        try:
            yield
            self.finish()
        finally:
            self.start()

    def record(self, seconds: float, num_tokens: int) -> None:
        """Note how long a step took."""
        is_first = self._seconds_per_token == float("inf")
        if is_first or seconds <= self.calculate_limit(num_tokens):
            self._seconds_per_token = min(self._seconds_per_token, seconds / num_tokens)
            if num_tokens <= SHORT_STEP_TOKENS:
                self._slowest_short = max(self._slowest_short, seconds)

    def calculate_limit(self, num_tokens: int) -> float:
        """Return after how many seconds a step of so many tokens hangs."""
        per_token = self._seconds_per_token
        per_token = ASSUMED_SECONDS_PER_TOKEN if per_token == float("inf") else per_token
        return max(MIN_HANG_SECONDS, HANG_FACTOR * (self._slowest_short + num_tokens * per_token))

    def describe_hang(self) -> str | None:
        """Return that the present step hangs, in words; None: it does not."""
        started, limit = self._started, self.calculate_limit(self._num_tokens)
        seconds = 0.0 if started is None else time.monotonic() - started
        if seconds <= limit:
            return None
        return f"a step of the model has lasted {seconds:.0f} s, and {limit:.0f} s are the most that it should take"
