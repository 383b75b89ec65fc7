"""Rewards that a program or a server gives, in whatever language it is written.

    command:PROGRAM ARGUMENTS    gets a line of JSON for each answer on stdin, and prints a number for each
    http://…, https://…          gets one POST for a batch, and answers with its rewards

A line, or the body of the request, has `prompts`, `completions` and the columns of the rows, as a Python function gets
them; a line has `prompt` and `completion`.
"""

import json
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .reward_errors import RewardArgumentError, RewardUnavailableError

TRIES, FIRST_WAIT_SECONDS = 4, 0.5
"""How often a request is sent to a server that refuses the connection or is busy; each wait is twice the one before."""
BUSY, ABOUT_THE_REQUEST = (429, 500, 502, 503, 504), (400, 413, 422)
MOST_RESPONSE_BYTES = 1 << 26


def make_command_reward(command: str) -> Callable[..., list[str]]:
    """Return the reward that a program gives; it is started once for each batch of answers."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RewardArgumentError(f"{command!r} is no command: {error}", "command:PROGRAM ARGUMENTS") from error
    if not words:
        raise RewardArgumentError("the program is missing", "command:PROGRAM ARGUMENTS")
    program = shutil.which(str(Path(words[0]).expanduser()))
    if program is None:
        raise RewardArgumentError(f"there is no program {words[0]!r}", "a program in PATH, or the path of one")

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[str]:
        rows = [
            {**{name: values[i] for name, values in columns.items()}, "prompt": prompt, "completion": text}
            for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        found = subprocess.run([program, *words[1:]], input=lines, stdout=subprocess.PIPE, text=True, errors="replace")
        if found.returncode:
            how = f"signal {-found.returncode}" if found.returncode < 0 else f"exit code {found.returncode}"
            raise RuntimeError(f"the program ended with {how}")
        return found.stdout.split()

    return score


def make_http_reward(url: str) -> Callable[..., Any]:
    """Return the reward that a server gives."""

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> Any:
        body = json.dumps({"prompts": prompts, "completions": completions, "columns": columns}, default=str).encode()
        try:
            found = json.loads(_post(url, body))
        except ValueError:
            raise ValueError("the server's response is no JSON") from None
        rewards = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(rewards, list):
            raise ValueError('the server\'s response has no "rewards", a list with a number for each answer')
        return rewards

    return score


def _post(url: str, body: bytes) -> bytes:
    """Return the response to a POST; try again while the server is busy, but not for ever."""
    headers = {"Content-Type": "application/json", "User-Agent": "slimtune"}
    problem = ""
    for number in range(TRIES):
        if number:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1))
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
                found: bytes = response.read(MOST_RESPONSE_BYTES)
                return found
        except urllib.error.HTTPError as error:
            if error.code not in BUSY:
                kind = ValueError if error.code in ABOUT_THE_REQUEST else RewardUnavailableError
                raise kind(f"the server responds with {error.code} {error.reason}") from None
            problem = f"it responds with {error.code} {error.reason}"
        except OSError as error:
            problem = str(getattr(error, "reason", error))
    raise RewardUnavailableError(f"the server did not score the answers in {TRIES} tries: {problem}")
