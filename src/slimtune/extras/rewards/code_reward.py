"""The reward `code`: runs the answer's Python code, and then the row's tests, each in a limited process of its own.

    an answer ─▶ its last ``` block, or all of it ─▶ python: the code, then the tests ─▶ 1 if all of it ran, else 0

Limits: processor time, memory, size of files, no child that outlives it; on Linux with user namespaces no network
either. This keeps a run from mistakes of its own model. It is no wall against an attacker: the code runs as the user,
and reads, changes and deletes what the user may. An answer that looks for the tests in the memory of its process can
pass them without solving them.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from ...core.foundation.cpu import count_usable_cpus
from .process_sessions import kill_session

SECONDS = 5
"""How long an answer and its tests may take together: processor time, and twice as long by the clock."""
MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 1 << 30, 1 << 20, 64
NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
"""What starts a process without a network, whose children end with it (util-linux)."""

# It gets a JSON object on stdin. The last word goes to the real stdout, which the code does not get: code that ends
# the process early has not passed.
_DRIVER = f"""
import json, os, sys
try:
    import resource
    for name, value in (("CPU", {SECONDS}), ("AS", {MEMORY_BYTES}), ("FSIZE", {FILE_BYTES}), ("NOFILE", {OPEN_FILES}),
                        ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
except (ImportError, ValueError, OSError):
    pass
given = json.loads(sys.stdin.read())
out = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nothing, number)
names = {{"__name__": "__main__"}}
try:
    exec(compile(given["code"], "answer", "exec"), names)
    exec(compile(given["tests"], "tests", "exec"), names)
except BaseException:
    os._exit(1)
os.write(out, given["word"].encode())
"""


def score_code(codes: Sequence[str], tests: Sequence[str]) -> list[float]:
    """Return 1 for each piece of code that runs and passes its tests, else 0; as many at once as there are cores."""
    with ThreadPoolExecutor(count_usable_cpus()) as pool:
        return [float(passed) for passed in pool.map(passes_tests, codes, tests)]


def passes_tests(code: str, tests: str) -> bool:
    """Return whether Python code runs to its end, and the tests after it, inside the limits."""
    word = secrets.token_hex(16)
    given = json.dumps({"code": code, "tests": tests, "word": word})
    starter = NO_NETWORK if can_disable_network() else ()
    with tempfile.TemporaryDirectory(prefix="slimtune-code-") as folder:
        command = [*starter, sys.executable, "-I", "-S", "-B", "-c", _DRIVER]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace", cwd=folder, env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(given, timeout=2 * SECONDS)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            kill_session(process)
    return said == word


@cache
def can_disable_network() -> bool:
    """Return whether this machine lets a user start a process without a network."""
    if sys.platform != "linux" or shutil.which(NO_NETWORK[0]) is None:
        return False
    try:
        return subprocess.run([*NO_NETWORK, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_code(answer: str) -> str:
    """Return the last fenced block of an answer, or all of it if it has none."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return blocks[-1] if blocks else answer


def make_code_reward(tests_of: Callable[[dict[str, list[Any]]], list[Any]]) -> Callable[..., list[float]]:
    """Return the reward `code`; `tests_of` returns the rows' tests from their columns."""

    def code(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        return score_code([*map(find_code, completions)], ["\n".join(_list_lines(t)) for t in tests_of(columns)])

    return code


def _list_lines(tests: Any) -> list[str]:
    """Return a row's tests as lines: a text, or a list of texts (MBPP has `test_list`)."""
    return [str(line) for line in tests] if isinstance(tests, list) else [str(tests)]
