"""Rewards that come with slimtune. Each gives 0 to 1 for an answer.

    exact-match[:COLUMN]      1 if the answer is the text of the column, without white space around it
    numeric-match[:COLUMN]    1 if the last number of the answer is that of the column
    regex:PATTERN             1 if the whole answer, without white space around it, matches
    json-schema:FILE          1 if the answer is JSON that fits the schema
    length:CHARACTERS         1 up to so many characters, and falling to 0 at twice as many
    code[:COLUMN]             1 if the answer is Python code that passes the tests in the column (code_reward.py)
    reasoning-gym:TASK        what the task's scorer says (reasoning_gym_tasks.py)
    command:PROGRAM           what a program says (outside_rewards.py)

COLUMN is `answer` unless another is named, and `tests` for code.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import format_names, suggest
from .outside_rewards import make_command_reward
from .reward_errors import RewardArgumentError, RewardColumnError

PATTERN_SECONDS = 1.0
"""How long a pattern may search an answer: some take exponential time."""
NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def _require_column(columns: dict[str, list[Any]], name: str) -> list[Any]:
    if name not in columns:
        found = format_names(columns) if columns else "none beside the prompt"
        raise RewardColumnError(f"rows have no column {name!r}{suggest(name, columns)} (columns: {found})")
    return columns[name]


def make_exact_match(argument: str) -> Callable[..., list[float]]:
    """Return the reward `exact-match`; its argument is a column."""
    column = argument or "answer"

    def exact_match(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        right = _require_column(columns, column)
        return [float(text.strip() == str(value).strip()) for text, value in zip(completions, right, strict=True)]

    return exact_match


def make_numeric_match(argument: str) -> Callable[..., list[float]]:
    """Return the reward `numeric-match`; its argument is a column."""
    column = argument or "answer"

    def numeric_match(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        right = _require_column(columns, column)
        pairs = zip(map(find_last_number, completions), right, strict=True)
        return [float(_is_same_number(number, find_last_number(str(value)))) for number, value in pairs]

    return numeric_match


def make_regex(argument: str) -> Callable[..., list[float]]:
    """Return the reward `regex`; its argument is a pattern of the package regex."""
    import regex  # takes a while to import

    if not argument:
        raise RewardArgumentError("the pattern is missing", "regex:PATTERN")
    try:
        pattern = regex.compile(argument, regex.DOTALL)
    except regex.error as error:
        raise RewardArgumentError(f"the pattern is not valid: {error}", "a regular expression") from error

    def matches(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        found = (pattern.fullmatch(text.strip(), timeout=PATTERN_SECONDS) for text in completions)
        return [float(match is not None) for match in found]

    return matches


def make_json_schema(argument: str) -> Callable[..., list[float]]:
    """Return the reward `json-schema`; its argument is a file."""
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise RewardArgumentError(f"there is no file {argument!r}", "json-schema:FILE")
    try:
        import jsonschema
    except ImportError as error:
        problem = "the package jsonschema is not installed"
        raise RewardArgumentError(problem, "pip install jsonschema, or another reward") from error
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        validator = jsonschema.validators.validator_for(schema)
        validator.check_schema(schema)
    except (ValueError, OSError, jsonschema.SchemaError) as error:
        problem = f"{path} is no JSON schema: {str(error).splitlines()[0]}"
        raise RewardArgumentError(problem, "a JSON schema") from error

    def fits(text: str) -> bool:
        try:
            return bool(validator(schema).is_valid(json.loads(text)))
        except ValueError:
            return False

    def json_schema(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        return [float(fits(text)) for text in completions]

    return json_schema


def make_length(argument: str) -> Callable[..., list[float]]:
    """Return the reward `length`; its argument is a number of characters."""
    if not argument.isdecimal() or int(argument) < 1:
        raise RewardArgumentError(f"{argument!r} is no number of characters", "length:CHARACTERS, 1 or more")
    limit = int(argument)

    def length(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        return [min(1.0, max(0.0, 2 - len(text) / limit)) for text in completions]

    return length


def make_code(argument: str) -> Callable[..., list[float]]:
    """Return the reward `code`; its argument is the column of the tests."""
    from .code_reward import make_code_reward

    return make_code_reward(lambda columns: _require_column(columns, argument or "tests"))


def make_reasoning_gym(argument: str) -> Callable[..., list[float]]:
    """Return the reward of a task of reasoning-gym."""
    from .reasoning_gym_tasks import make_reasoning_gym_reward

    return make_reasoning_gym_reward(argument)


def find_last_number(text: str) -> float | None:
    """Return the last number in a text; commas between its digits are left out."""
    found = re.findall(NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def _is_same_number(number: float | None, right: float | None) -> bool:
    return number is not None and right is not None and math.isclose(number, right, rel_tol=1e-6, abs_tol=1e-9)


BUILTIN_REWARDS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "exact-match": make_exact_match,
    "numeric-match": make_numeric_match,
    "regex": make_regex,
    "json-schema": make_json_schema,
    "length": make_length,
    "code": make_code,
    "reasoning-gym": make_reasoning_gym,
    "command": make_command_reward,
}
"""What makes each built-in reward from the text after its name."""
