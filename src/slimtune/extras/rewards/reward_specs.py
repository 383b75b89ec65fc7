"""How a recipe names a reward: `file.py:function`, `http://…`, or a built-in one with its argument, `length:80`."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ...errors import format_names, suggest
from .builtin_rewards import BUILTIN_REWARDS
from .outside_rewards import make_http_reward
from .reward_errors import RewardArgumentError

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, **columns)` returns a number for each completion."""


class RewardSpecError(NamedTuple):
    """What is wrong with the name of a reward, as a clause."""

    problem: str
    expected: str
    hint: str = ""


def is_file_reward(spec: str) -> bool:
    """Return whether a reward is a function in a file."""
    return spec.rpartition(":")[0].endswith(".py") and not spec.startswith(("command:", "http://", "https://"))


def is_http_reward(spec: str) -> bool:
    """Return whether a reward is a server that scores answers."""
    return spec.startswith(("http://", "https://"))


def make_reward_path_absolute(spec: str, folder: Path) -> str:
    """Return a reward with an absolute path of its file, schema or program, if that exists in a folder."""
    head, _, tail = spec.rpartition(":") if is_file_reward(spec) else spec.partition(":")
    path, space, arguments = (head, "", "") if is_file_reward(spec) else tail.partition(" ")
    if not is_file_reward(spec) and head not in ("json-schema", "command"):
        return spec
    found = folder / Path(path).expanduser()
    if not path or not found.is_file():
        return spec
    return f"{found.absolute()}:{tail}" if is_file_reward(spec) else f"{head}:{found.absolute()}{space}{arguments}"


def make_short_reward_name(spec: str) -> str:
    """Return what logs call a reward: the name of its function, its server, or that of the built-in one."""
    if is_http_reward(spec):
        return urlsplit(spec).netloc.rpartition("@")[2]
    return spec.rpartition(":")[2] if is_file_reward(spec) else spec.partition(":")[0]


def find_reward_error(spec: str) -> RewardSpecError | None:
    """Return what is wrong with a reward, as far as it is known without running the user's code."""
    if is_file_reward(spec):
        file, _, function = spec.rpartition(":")
        path = Path(file).expanduser()
        if not path.is_file():
            near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            return RewardSpecError(f"there is no file {file}{suggest(path.name, near)}", "a Python file:function")
        if not function.isidentifier():
            return RewardSpecError(f"{function!r} is no name of a function", "file.py:function")
        return None
    if spec.endswith(".py") and ":" not in spec:
        return RewardSpecError("the function is missing", "file.py:function", f"{spec}:reward")
    if is_http_reward(spec):
        return None if urlsplit(spec).hostname else RewardSpecError(f"{spec} names no server", "http://HOST:PORT/PATH")
    name, _, argument = spec.partition(":")
    if name not in BUILTIN_REWARDS:
        return RewardSpecError(
            f"there is no built-in reward {name!r}{suggest(name, BUILTIN_REWARDS)}",
            f"file.py:function, http://…, or one of {format_names(BUILTIN_REWARDS)}",
        )
    try:
        BUILTIN_REWARDS[name](argument)
    except RewardArgumentError as error:
        return RewardSpecError(str(error), error.expected)
    return None


def load_reward(spec: str) -> RewardFunction:
    """Return a reward; run in the process of the reward, as importing the user's file may do anything.

    Raises:
        LookupError: the file has no such function.
    """
    if is_http_reward(spec):
        return make_http_reward(spec)
    if not is_file_reward(spec):
        name, _, argument = spec.partition(":")
        return BUILTIN_REWARDS[name](argument)
    file, _, name = spec.rpartition(":")
    found = importlib.util.spec_from_file_location("slimtune_reward", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise LookupError(f"{file} has no function {name!r}{suggest(name, functions)}")
    loaded: RewardFunction = function
    return loaded


def format_record(values: Any) -> str:
    """Return values as one line of JSON."""
    return json.dumps(values, ensure_ascii=True, default=str)
