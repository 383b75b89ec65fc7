"""Write docs/schemas.md and docs/schemas/*.json from the result types: `python docs/internals/make_schemas.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtune.cli.json_types import JSON_TYPES, make_command_output_schema

DOCS = Path(__file__).parents[1]
START = """# What `--json` prints

With `--json` a command prints one JSON object on stdout, and all else goes to stderr. Each object has a
[JSON Schema](https://json-schema.org), made from the types in the source; a test checks the output of every command
against it. An error is `{"error": {"kind": …, "message": …, "expected": …, "hint": …, "exit_code": …, "code": …}}`.

A key `x_ci95` is the 95 % interval of `x`, `[low, high]`. `a[].b` is the key `b` of each item of the list `a`, and
`a.NAME.b` that of each value of the object `a`, whose keys are names.
"""


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return the type of a value in a few words."""
    if "enum" in schema:
        return " or ".join(f'"{value}"' if isinstance(value, str) else f"{value}" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(describe_type, schema["anyOf"])))
    kinds = schema.get("type", "any")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def list_rows(schema: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield key, type and meaning of every value in an object, those inside of others after them."""
    for key, value in schema.get("properties", {}).items():
        path = f"{prefix}{key}"
        yield path, describe_type(value), value.get("description", "")
        yield from list_inner_rows(value, path)


def list_inner_rows(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the objects inside a value."""
    for inner in schema.get("anyOf", [schema]):
        yield from list_rows(inner, f"{path}.")
        for place, item in ((f"{path}[]", inner.get("items")), (f"{path}.NAME", inner.get("additionalProperties"))):
            if isinstance(item, Mapping):
                yield from list_rows(item, f"{place}.")
                yield from list_inner_rows(item, place)


def write_tables(command: str) -> str:
    """Return the section of a command."""
    schema = make_command_output_schema(command)
    parts = [f"## {command}", f"[{command}.json](schemas/{command}.json)"]
    first = next(other for other in JSON_TYPES if JSON_TYPES[other] == JSON_TYPES[command])
    if first != command:
        return "\n\n".join([*parts, f"The keys of [{first}](#{first})."])
    shown: dict[str, set[tuple[str, str, str]]] = {}
    for result in schema.get("anyOf", [schema]):
        known = set().union(*shown.values())
        shown[result["title"]] = {*list_rows(result)}
        new = [row for row in list_rows(result) if row not in known]
        rows = [f"| `{key}` | {kind} | {' '.join(text.split())} |" for key, kind, text in new]
        same = ["The keys that are not listed here are described above."] if known & shown[result["title"]] else []
        table = "\n".join(["| key | type | meaning |", "| --- | --- | --- |", *rows])
        parts += [" ".join([result["description"], *same]), table]
    return "\n\n".join(parts)


def make_files() -> dict[Path, str]:
    """Return the text of each file."""
    files = {
        DOCS / "schemas" / f"{command}.json": json.dumps(
            make_command_output_schema(command), indent=1, ensure_ascii=False
        )
        + "\n"
        for command in JSON_TYPES
    }
    page = "\n\n".join([START.strip(), *map(write_tables, JSON_TYPES)]) + "\n"
    return {**files, DOCS / "schemas.md": page}


if __name__ == "__main__":
    for file, text in make_files().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
