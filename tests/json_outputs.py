"""What `--json` prints, against the schemas that the documentation shows."""

from functools import cache
from typing import Any

import jsonschema

from slimtune.cli.json_types import JSON_TYPES, make_command_output_schema


@cache
def build_validator(command: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(make_command_output_schema(command))


def require_schema(command: str, printed: Any) -> None:
    """Raise ValidationError unless a command's output has its schema, or is an error."""
    if command in JSON_TYPES and "error" not in printed:
        build_validator(command).validate(printed)
