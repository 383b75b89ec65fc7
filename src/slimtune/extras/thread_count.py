"""The number of threads of a training on a CPU, which follows what other processes leave of the cores.

All threads of a matrix product wait for the slowest. If another process has one's core, the rest wait a time slice of
several milliseconds, thousands of times a step: two threads beside four busy processes train at an eighth of the speed
of one. So while the cores are contended half as many threads are tried for a few steps, and once they are free twice as
many; the faster number stays.
"""

import statistics
from collections.abc import Callable

import torch

CONTENDED = 0.8
"""Share of a step's time that the main thread computes, below which other processes have its core."""
WINDOW_STEPS, WINDOW_SECONDS = 3, 10.0
"""Steps that are compared, or fewer that took so many seconds together."""
STEPS_BETWEEN_TRIALS = 30
FASTER = 1.05
"""Another number of threads must be faster by this factor to stay."""


class ContinuousThreadCountTuner:
    """Chooses torch's number of threads after each step of a training.

    Args:
        log: gets a sentence when the number changes, and once when other processes compete and it stays.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.say, self.most = log, torch.get_num_threads()
        self.before_trial: tuple[int, float] | None = None  # threads and tokens a second before the trial that runs
        self.steps_until_trial = 0
        self.told = False
        self.start_window()

    def start_with(self, threads: int) -> None:
        """Set the number of threads that a checkpoint was written with, at most torch's own."""
        torch.set_num_threads(min(threads, self.most))

    def start_window(self) -> None:
        """Forget the measured steps."""
        self.rates: list[float] = []
        self.shares: list[float] = []
        self.seconds = 0.0

    def after_step(self, tokens: int, seconds: float, share: float) -> None:
        """Note a step: its tokens, its time, and the share of the time that the main thread computed."""
        self.rates.append(tokens / max(seconds, 1e-9))
        self.shares.append(share)
        self.seconds += seconds
        self.steps_until_trial -= 1
        if len(self.rates) < WINDOW_STEPS and self.seconds < WINDOW_SECONDS:
            return
        rate, contended = statistics.median(self.rates), statistics.median(self.shares) < CONTENDED
        threads = torch.get_num_threads()
        if self.before_trial is not None:
            self.end_trial(threads, rate)
        elif self.steps_until_trial <= 0:
            other = threads // 2 if contended else min(2 * threads, self.most)
            if other not in (0, threads):
                self.before_trial = (threads, rate)
                torch.set_num_threads(other)
            elif contended:
                self.say_once("with its one thread training waits for them")
        self.start_window()

    def end_trial(self, threads: int, rate: float) -> None:
        """Keep the number of threads that was tried, or return to the one before."""
        assert self.before_trial is not None
        (before, rate_before), self.before_trial = self.before_trial, None
        if rate > FASTER * rate_before:
            reason = "other processes compete for the cores" if threads < before else "the cores are free again"
            faster = f"{rate / rate_before:.1f} times as fast"
            self.say(f"{reason}: training goes on with {threads} of {self.most} threads, now {faster}")
            return
        torch.set_num_threads(before)
        self.steps_until_trial = STEPS_BETWEEN_TRIALS
        if threads < before:
            self.say_once(f"{before} threads are still faster than {threads}")

    def say_once(self, what: str) -> None:
        """Say the first time that other processes compete for the cores."""
        if not self.told:
            self.say(f"other processes compete for the cores, which slows training; {what}")
        self.told = True

    def restore(self) -> None:
        """Set the number of threads that torch had at the start."""
        torch.set_num_threads(self.most)
