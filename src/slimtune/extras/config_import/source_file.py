"""Read another trainer's config: YAML, JSON, or the arguments of a command line in a shell script."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...core.foundation.files import read_json_object, refuse_non_regular_file
from ...core.foundation.strict_yaml import parse_yaml
from ...errors import RecipeError, UsageError

MAX_BYTES = 4 << 20
_PROGRAMS = {
    r"\bswift\s+(sft|pt|rlhf)\b": "ms-swift", r"\btrl\s+(sft|dpo|kto|orpo|reward|grpo)\b": "trl",
    r"\b(sft|dpo|kto|orpo|reward_modeling)\w*\.py\b": "trl", r"\bllamafactory-cli\s+train\b": "llama-factory",
    r"\bsrc/train(?:_bash)?\.py\b": "llama-factory", r"mlx_lm[. ]lora\b": "mlx-lm",
}  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """The fields of a config."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    program: str = ""  # the trainer that a command line starts; "": it is no command line
    command: str = ""  # its subcommand or script: sft, dpo, …
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, which the file says as a whole
    context: Mapping[str, Any] = field(default_factory=dict)  # what else rules read, by "trainer:name"
    not_in_file: tuple[str, ...] = ()  # settings of the recipe that a person has to write
    without_defaults: frozenset[str] = frozenset()  # fields whose defaults do not count for this file


def read_source_file(path: Path) -> SourceFile:
    """Return the fields of a file; for an adapter's folder those of its adapter_config.json and trainer_state.json.

    Raises:
        UsageError: there is no such file, or it is too large.
        RecipeError: it is neither YAML, JSON nor a command line.
    """
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise UsageError(f"{path} is a folder without adapter_config.json", "a config file, or an adapter's folder")
        path = path / "adapter_config.json"
    if not path.exists():
        raise UsageError(f"there is no {path}", "a config file")
    refuse_non_regular_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes", f"at most {MAX_BYTES:,}")
    if path.name == "adapter_config.json":
        state = path.parent / "trainer_state.json"
        trained = dict(read_json_object(state)) if state.is_file() else {}
        return SourceFile(path, dict(read_json_object(path)) | trained)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text", "YAML, JSON or a command line in UTF-8") from None
    if path.suffix in (".sh", ".bash", ".txt") or text.startswith("#!"):
        return _parse_command_line(path, text)
    values: Any = read_json_object(path) if path.suffix == ".json" else parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no mapping of fields to values", "a trainer's config")
    return SourceFile(path, {str(k): v for k, v in values.items()})


def _parse_command_line(path: Path, text: str) -> SourceFile:
    """Return the arguments of the first command that starts a trainer."""
    text = re.sub(r"\\\s*\n", " ", re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
    for line in text.splitlines():
        for pattern, program in _PROGRAMS.items():
            if match := re.search(pattern, line):
                arguments = re.sub(r"\$\(([^()]*)\)", lambda m: f"'$({m[1]})'", line[match.end() :])
                try:
                    words = shlex.split(arguments, comments=True)
                except ValueError as error:
                    raise RecipeError(f"{path} has a command line that cannot be read: {error}", "a command") from None
                command = next((group for group in match.groups() if group), "") if match.groups() else ""
                return SourceFile(path, _collect_arguments(words), program, command)
    raise RecipeError(f"{path} starts no trainer that is known", "a command line of swift, trl, or mlx_lm.lora")


def _collect_arguments(words: list[str]) -> dict[str, Any]:
    """Return the values by argument: a switch is True, several values are a list; numbers are read as in YAML."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            found[name] = _read_value(value) if equals else True
        elif name:
            value = _read_value(word)
            found[name] = value if found[name] is True else [*_as_list(found[name]), value]
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, str | int | float | bool) and text else text
