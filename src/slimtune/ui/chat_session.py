"""The chat of the page: the conversation with the run that is loaded, as every tab sees it.

It is a client of the process that holds the model: `generation/chat_worker.py` says which events it reads.
"""

import contextlib
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.data.rows import InvalidRow
from ..core.foundation.files import parse_json, to_json
from ..errors import UsageError
from ..extras.row_columns import parse_row_or_error

CHAT_WORKER = (sys.executable, "-m", "slimtune.generation.chat_worker")
MAX_TURNS, MAX_TEXT, MAX_ANSWER = 100, 32_000, 100_000
"""Turns that are shown, and the characters of a message and of an answer."""

ChatState = Literal["loading", "ready", "answering", "ended"]


class ChatSession:
    """A conversation with one run, in a process that holds its model.

    Args:
        run: the run folder.
        working_folder: where the process runs.
        program: the process, which gets the run as its argument.
    """

    def __init__(self, run: str, working_folder: Path, program: Sequence[str] = CHAT_WORKER) -> None:
        self.run = run
        self.state: ChatState = "loading"
        self.description = ""
        self.error: Mapping[str, str] = {}
        self.turns: deque[dict[str, str]] = deque(maxlen=MAX_TURNS)
        self.system = ""
        self._asked = 0
        self.messages: deque[str] = deque(maxlen=20)
        self._lock = threading.Lock()
        self.process = subprocess.Popen(
            [*program, run], cwd=working_folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._read_events, self._read_messages)]
        for thread in self._threads:
            thread.start()

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as events:
            for line in events:
                try:
                    event = parse_json(line)
                except ValueError:
                    continue
                with self._lock:
                    self._take(event)
        code = self.process.wait()
        with self._lock:
            if not self.error:
                signal_name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                why = "; the system does so when memory runs out" if code == -signal.SIGKILL else ""
                self.error = {"message": f"the model's process ended with {signal_name}{why}", "hint": "load it again"}
            self.state = "ended"

    def _take(self, event: Mapping[str, Any]) -> None:
        match event:
            case {"ready": description}:
                self.state, self.description = "ready", description
            case {"model": model, "piece": piece} if self.turns:
                turn = self.turns[-1]
                turn[model] = (turn.get(model, "") + piece)[:MAX_ANSWER]
            case {"model": model, "cut": True} if self.turns:
                self.turns[-1][f"{model}_cut"] = "yes"
            case {"problem": problem} if self.turns:
                self.turns[-1]["problem"] = problem
            case {"end": _}:
                self.state = "ready"
            case {"error": error}:
                self.error = error

    def _read_messages(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as messages:
            for line in messages:
                self.messages.append(line.rstrip()[:500])

    def ask(self, text: str, models: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Send a message to the models; raise UsageError unless they are ready for it."""
        if not text.strip():
            raise UsageError("the message is empty", "a text")
        if len(text) > MAX_TEXT:
            raise UsageError(f"the message has {len(text)} characters", f"at most {MAX_TEXT}")
        with self._lock:
            if self.state != "ready":
                hint = {"loading": "wait until the model is loaded", "answering": "wait for the answer, or stop it"}
                raise UsageError(f"the model is not ready: {self.state}", hint=hint.get(self.state, "load it again"))
            self.state = "answering"
            self._asked += 1
            self.turns.append({"number": str(self._asked), "user": text, **dict.fromkeys(models, "")})
        self._send({"text": text, "models": list(models), "settings": dict(settings)})

    def begin(self, system: str) -> None:
        """Begin a new conversation, with a system message unless it is empty."""
        if self.state == "answering":
            raise UsageError("the model is answering", hint="wait for the answer, or stop it")
        with self._lock:
            self.turns.clear()
            self.system = system.strip()
        self._send({"system": self.system or None})

    def make_rated_row(self, number: str, model: str, is_good: bool) -> dict[str, Any]:
        """Return an answer with the conversation before it as a row of ratings, which KTO learns from.

        Args:
            number: of the turn.
            model: "base" or "tuned".
            is_good: thumbs up.

        Raises:
            UsageError: there is no such answer, or it is not complete.
        """
        turns = [dict(turn) for turn in self.turns]
        place = next((i for i, turn in enumerate(turns) if turn["number"] == number), None)
        asked = turns[: place + 1] if place is not None and model in ("base", "tuned") else []
        if not asked or not all(turn.get(model, "").strip() and "problem" not in turn for turn in asked):
            raise UsageError("this answer cannot be rated", "an answer that is complete and still shown")
        if self.state == "answering" and asked[-1] == turns[-1]:
            raise UsageError("this answer is not complete", hint="wait for it, or stop it")
        prompt = [{"role": "system", "content": self.system}] if self.system else []
        for turn in asked:
            prompt += [{"role": "user", "content": turn["user"]}, {"role": "assistant", "content": turn[model]}]
        row = {"prompt": prompt[:-1], "completion": prompt[-1:], "label": is_good}
        if isinstance(found := parse_row_or_error(row, "unpaired-preference", 1), InvalidRow):
            raise UsageError(f"this answer cannot be learned from: {found.cause}", hint=found.hint)
        return row

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, which the page says
            self.process.stdin.write(to_json(request) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Stop the answer that is being generated."""
        if self.state == "answering":
            self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the process, which gives its memory back."""
        self.process.kill()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        for thread in self._threads:
            thread.join(5)
        self.error = {}
