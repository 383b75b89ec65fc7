"""JSON Schemas of what commands print with `--json`, made from the dataclasses and the strings below their fields."""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from ..core.foundation.json_results import (
    JSON_TYPE_NAMES,
    JsonObject,
    find_json_suffixes_by_field,
    get_json_key,
    is_mapping_type,
    is_sequence_type,
    list_json_fields_with_types,
    unwrap_optional_dataclass,
)


def make_json_schema(cls: Any) -> JsonObject:
    """Return the JSON Schema of a result: its fields with their descriptions; those of other results are inside."""
    required: list[str] = []
    schema: dict[str, Any] = {"title": cls.__name__, "description": inspect.cleandoc(cls.__doc__ or "")}
    properties: dict[str, Any] = {}
    further: Any = False
    docs = read_field_docstrings(cls)
    for field, kind in list_json_fields_with_types(cls):
        inner = _describe_type(kind)
        if suffixes := find_json_suffixes_by_field(kind):
            properties |= _describe_suffixed(get_json_key(field), kind, suffixes, docs.get(field.name, ""))
            required += [get_json_key(field) + suffix for suffix in suffixes.values()]
            continue
        if field.metadata.get("inline"):
            if (inline_class := unwrap_optional_dataclass(kind)) is not None:
                inner = make_json_schema(inline_class)
            properties |= inner.get("properties", {})
            required += [] if type(None) in get_args(kind) else inner.get("required", [])
            further = further or inner.get("additionalProperties", False)
            continue
        properties[get_json_key(field)] = inner | ({"description": docs[field.name]} if field.name in docs else {})
        if not field.metadata.get("omit_none"):
            required.append(get_json_key(field))
    return schema | {
        "type": "object", "properties": properties, "required": required, "additionalProperties": further
    }  # fmt: skip


def _describe_suffixed(key: str, kind: Any, suffixes: Mapping[str, str], text: str) -> JsonObject:
    """Return the properties of a value that is written as a key for each of its parts."""
    may_be_null = type(None) in get_args(kind)
    cls = unwrap_optional_dataclass(kind)
    docs, properties = read_field_docstrings(cls), {}
    for field, part in list_json_fields_with_types(cls):
        described = _describe_type(part | None if may_be_null else part)
        note = docs.get(field.name, "") if suffixes[field.name] else ""
        properties[key + suffixes[field.name]] = described | {"description": f"{text} {note}".strip()}
    return properties


def _describe_type(kind: Any) -> JsonObject:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind is type(None):
        return {"type": "null"}
    if origin in (Union, types.UnionType):
        members = [_describe_type(member) for member in args]
        if all([*member] == ["type"] for member in members):
            return {"type": [member["type"] for member in members]}
        return {"anyOf": members}
    if origin is Literal:
        return {"enum": list(args)}
    if is_dataclass(kind):
        return make_json_schema(kind)
    if is_mapping_type(kind):
        return {"type": "object", "additionalProperties": _describe_type(args[1]) if args else True}
    if is_sequence_type(kind):
        if (origin or kind) is tuple and args and args[-1] is not ...:
            items = {"prefixItems": [_describe_type(a) for a in args], "minItems": len(args), "maxItems": len(args)}
        else:
            items = {"items": _describe_type(args[0] if args else Any)}
        return {"type": "array", **items}
    return {"type": JSON_TYPE_NAMES[kind]}


@cache
def read_field_docstrings(cls: Any) -> dict[str, str]:
    """Return the string that stands below each field of a dataclass, by the field's name; those of its bases, too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _find_docs(base)
    return docs


def _find_docs(cls: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, inspect.cleandoc(str(below.value.value))
