"""Scores answers with several rewards, each in a process of its own, all at once and each with a time limit."""

import atexit
import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RunError
from .process_sessions import kill_session
from .reward_specs import format_record, is_file_reward, make_short_reward_name

START_SECONDS = 120.0
"""How long a reward may take to load: its file may import torch, or load a model."""
SECONDS_ALONE = 5.0
"""How long each answer of a batch that took too long may take alone, to find which one hangs."""


@dataclass(frozen=True)
class AnswersToScore:
    """A batch of answers as rewards get it, and where the prompts are from, for errors."""

    prompts: list[Any]  # as the rows have them: a text or messages
    completions: list[str]
    columns: dict[str, list[Any]]  # the other columns of the rows
    lines: list[int]
    file: str

    def with_completions(self, completions: list[str]) -> "AnswersToScore":
        """Return the batch with other answers."""
        return replace(self, completions=completions)

    def select(self, number: int) -> "AnswersToScore":
        """Return one answer as a batch."""
        part = slice(number, number + 1)
        columns = {name: values[part] for name, values in self.columns.items()}
        return AnswersToScore(self.prompts[part], self.completions[part], columns, self.lines[part], self.file)


class RewardTimeout(Exception):
    """A reward did not answer in time."""


class RewardWorkers:
    """The rewards of a run; their processes start with the first batch and end with this one.

    Args:
        specs: names of the rewards (`reward_specs.py`).
        weights: of each in the sum; empty: 1 each.
        timeout: seconds for a batch.
    """

    def __init__(self, specs: Sequence[str], weights: Sequence[float], timeout: float) -> None:
        self.names = [*map(make_short_reward_name, specs)]
        self.weights = [*(weights or [1.0] * len(specs))]
        self.timeout = timeout
        self.processes = [RewardProcess(spec) for spec in specs]

    def try_out(self, answers: AnswersToScore) -> None:
        """Load every reward, and let the built-in ones score some answers; raises as `score`.

        A function of the user's is only loaded: it may expect answers as a model writes them.
        """
        for process in self.processes:
            process.start()
            if not is_file_reward(process.spec):
                process.send(answers)
                process.receive(answers, self.timeout)
            process.has_scored = True

    def score(self, answers: AnswersToScore) -> list[list[float]]:
        """Return the rewards of each answer, one by each reward.

        Raises:
            RunError: a reward raised an error, took too long, or returned what is no reward; it names the row.
        """
        for process in self.processes:
            process.send(answers)
        by_reward = [process.receive(answers, self.timeout) for process in self.processes]
        return [list(values) for values in zip(*by_reward, strict=True)]

    def sum_weighted(self, rewards: Any) -> Any:
        """Return the weighted sums over the last dimension of a tensor of rewards."""
        return (rewards * rewards.new_tensor(self.weights)).sum(-1)


class RewardProcess:
    """The process of one reward."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.has_scored = False
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        atexit.register(self.kill)

    def send(self, answers: AnswersToScore) -> None:
        """Let the reward score answers; `receive` returns what it says."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"prompts": answers.prompts, "completions": answers.completions, "columns": answers.columns}
        try:
            self._process.stdin.write(format_record(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `receive` says that it has ended

    def receive(self, answers: AnswersToScore, timeout: float) -> list[float]:
        """Return the reward of each answer that was sent; raise RunError as `RewardWorkers.score`."""
        try:
            reply = self._read(timeout)
        except RewardTimeout:
            self.kill()
            raise self._make_error(f"it took longer than {timeout:g} seconds", self._find_hanging(answers), answers,
                                   "a faster reward, or a larger task.reward_timeout") from None  # fmt: skip
        if "error" in reply:
            raise self._make_error(reply["error"], reply["answer"], answers)
        rewards: list[float] = reply["rewards"]
        return rewards

    def kill(self) -> None:
        """End the process, whatever it does, and the programs that it has started."""
        if self._process is not None:
            kill_session(self._process)
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it has not read
                self._process.stdin.close()
            self._process = None

    def start(self) -> None:
        """Start the process; raise RunError if the reward cannot be loaded."""
        self._replies = queue.SimpleQueue()
        command = [sys.executable, "-m", "slimtune.extras.rewards.reward_process", self.spec]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
        )
        threading.Thread(target=_read_lines, args=(self._process, self._replies), daemon=True).start()
        try:
            reply = self._read(START_SECONDS)
        except RewardTimeout:
            self.kill()
            reply = {"error": f"it was not loaded after {START_SECONDS:g} seconds"}
        if "error" in reply:
            raise RunError(f"the reward {self.spec}: {reply['error']}", "a reward that loads", code="reward-failed")

    def _read(self, timeout: float) -> dict[str, Any]:
        """Return the next reply."""
        try:
            line = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise RewardTimeout from None
        if line is None:
            return {"error": "its process has ended", "answer": None}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _find_hanging(self, answers: AnswersToScore) -> int | None:
        """Return the number of the first answer that takes too long alone; None: only all together do."""
        for number in range(len(answers.completions)):
            self.send(answers.select(number))
            try:
                self._read(SECONDS_ALONE)
            except RewardTimeout:
                self.kill()
                return number
        return None

    def _make_error(
        self, problem: str, number: int | None, answers: AnswersToScore, hint: str = "correct the reward"
    ) -> RunError:
        where = ""
        if number is not None:
            text = answers.completions[number]
            where = f", for line {answers.lines[number]} of {answers.file} and the answer {text[:80]!r}"
        return RunError(
            f"the reward {self.spec}: {problem}{where}",
            "a finite number for each answer",
            f"{hint}; then go on from the last checkpoint with --resume" if self.has_scored else hint,
            code="reward-failed",
        )


def _read_lines(process: "subprocess.Popen[str]", replies: "queue.SimpleQueue[str | None]") -> None:
    """Put the lines that a process writes into a queue, and None after the last one."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            replies.put(line)
    replies.put(None)
