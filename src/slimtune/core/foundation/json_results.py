"""Results as types: a frozen dataclass is what a command prints as JSON, and its JSON Schema is made from it.

Each field has a string below it that says what it is, with its unit; the schema's descriptions are these strings.

    @dataclass(frozen=True)
    class TrainResult:
        \"""What `train --json` prints.\"""

        steps: int
        \"""Optimizer steps that were taken.\"""
        validation_loss: float | None
        \"""The kept adapter's loss on the validation rows, in nats per token; null: there are none.\"""

    to_json_dict(result) ─▶ {"steps": 30, "validation_loss": null} ─▶ from_json_dict(TrainResult, values)

Fields may be plain values, `Literal`s, paths, lists, tuples, mappings with string keys, and such dataclasses, each or
None. Four kinds are special, by the metadata of `dataclasses.field`:
`make_json_key_metadata("rewards/margins")` gives a key that is
no Python name, `OMIT_NONE` leaves the key out if the value is None, `NOT_IN_JSON` leaves out a field that has a
default, and `INLINE` puts the items of a mapping or the fields of a dataclass beside the other keys. A dataclass with
`json_suffixes` (field -> suffix) is written as a key for each of its fields, the name of
the field that has it and the suffix: an estimate `loss` as `loss` and `loss_ci95`.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
JsonObject = dict[str, Any]
"""An object in JSON whose keys others decide: of a file, of a request to another program or its answer, of a schema."""
OMIT_NONE: Mapping[str, Any] = {"omit_none": True}
"""Metadata of a field whose key is left out if its value is None."""
INLINE: Mapping[str, Any] = {"inline": True}
"""Metadata of a mapping or a dataclass whose keys stand beside those of the other fields."""
NOT_IN_JSON: Mapping[str, Any] = {"not_in_json": True}
"""Metadata of a field with a default that is only for this process."""
JSON_TYPE_NAMES: dict[Any, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null",
}  # fmt: skip


def make_json_key_metadata(key: str) -> Mapping[str, Any]:
    """Return the metadata of a field with this key in JSON."""
    return {"key": key}


def get_json_key(field: Field[Any]) -> str:
    """Return the key of a field in JSON."""
    return str(field.metadata.get("key", field.name))


def unwrap_optional_dataclass(type_hint: Any) -> Any:
    """Return the dataclass of a field, also if its value may be None; None if it has another type."""
    union = get_origin(type_hint) in (Union, types.UnionType)
    members = [m for m in (get_args(type_hint) if union else (type_hint,)) if m is not type(None)]
    return members[0] if len(members) == 1 and is_dataclass(members[0]) else None


def find_json_suffixes_by_field(type_hint: Any) -> Mapping[str, str]:
    """Return the `json_suffixes` of a dataclass, also if the value may be None; empty if it has none."""
    return getattr(unwrap_optional_dataclass(type_hint), "json_suffixes", {})


def _has_default(field: Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@cache
def list_json_fields_with_types(cls: Any) -> tuple[tuple[Field[Any], Any], ...]:
    """Return the fields of a dataclass that are in JSON, and the type of each."""
    hints = get_type_hints(cls)
    return tuple((f, hints[f.name]) for f in dataclasses.fields(cls) if not f.metadata.get("not_in_json"))


# --- writing ----------------------------------------------------------------------------------------------------------


def to_json_dict(result: Any) -> JsonObject:
    """Return a result as plain values for JSON, its keys in the order of the fields; NaN and Inf become None."""
    values: dict[str, Any] = {}
    cls: Any = type(result)
    for field, kind in list_json_fields_with_types(cls):
        value = to_plain(getattr(result, field.name))
        if suffixes := find_json_suffixes_by_field(kind):
            values |= {get_json_key(field) + suffix: (value or {}).get(name) for name, suffix in suffixes.items()}
        elif field.metadata.get("inline"):
            values |= value or {}
        elif value is not None or not field.metadata.get("omit_none"):
            values[get_json_key(field)] = value
    return values


def to_plain(value: Any) -> Any:
    """Return results, mappings, lists, paths and scalar tensors as plain values for JSON; NaN and Inf become None."""
    if is_dataclass(value):
        return to_json_dict(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | int | float):
        value = value.item()  # a scalar of numpy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- reading ----------------------------------------------------------------------------------------------------------


def from_json_dict(cls: type[T], data: Mapping[str, Any], *, strict: bool = True) -> T:
    """Return the result that `to_json_dict` wrote.

    Args:
        cls: the result's class.
        data: the values that were read from JSON.
        strict: raise for unknown keys; unless strict they are ignored, as another release may have written them, and
            so is a value of a wrong type if the field has a default or may be None.

    Raises:
        ValueError: a key is missing whose field has no default and may not be None, or a value has a wrong type; the
            message starts with the key's path ("versions.torch").
    """
    result: T = _read_object(cls, data, strict, "")
    return result


def _read_object(cls: Any, data: Any, strict: bool, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path or 'the result'}: it is no JSON object")
    values: dict[str, Any] = {}
    left = dict(data)
    inline = [(f, kind) for f, kind in list_json_fields_with_types(cls) if f.metadata.get("inline")]
    for field, kind in list_json_fields_with_types(cls):
        if field.metadata.get("inline"):
            continue
        if suffixes := find_json_suffixes_by_field(kind):
            parts = {
                name: left.pop(key)
                for name, suffix in suffixes.items()
                if (key := get_json_key(field) + suffix) in left
            }
            if parts:  # those of a value that is None are None
                left[get_json_key(field)] = parts if any(part is not None for part in parts.values()) else None
        where, optional = (
            f"{path}.{get_json_key(field)}".lstrip("."),
            _has_default(field) or type(None) in get_args(kind),
        )
        if get_json_key(field) not in left:
            if not optional or (strict and not _has_default(field) and not field.metadata.get("omit_none")):
                raise ValueError(f"{where}: it is missing")
            if not _has_default(field):
                values[field.name] = None
            continue
        try:
            values[field.name] = _read_value(kind, left.pop(get_json_key(field)), strict, where)
        except ValueError:
            if strict or not optional:
                raise
            if not _has_default(field):
                values[field.name] = None
    for field, kind in inline:  # each takes its keys, a mapping all that are left
        if (inner := unwrap_optional_dataclass(kind)) is not None:
            own = {key: left.pop(key) for key in _list_keys(inner) if key in left}
        else:
            own, left = left, {}
        values[field.name] = None if not own and type(None) in get_args(kind) else _read_value(kind, own, strict, path)
    if left and strict:
        raise ValueError(f"{f'{path}.{next(iter(left))}'.lstrip('.')}: there is no such key")
    return cls(**values)


def _read_value(kind: Any, value: Any, strict: bool, path: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for member in args:
            try:
                return _read_value(member, value, strict, path)
            except ValueError as error:
                errors.append(error)
        raise next((e for e, m in zip(errors, args, strict=True) if m is not type(None)), errors[0])
    if is_dataclass(kind):
        return _read_object(kind, value, strict, path)
    if origin is Literal:
        correct = value in args
    elif is_mapping_type(kind):
        correct = isinstance(value, Mapping)
        if correct:
            item = args[1] if args else Any
            return {key: _read_value(item, v, strict, f"{path}.{key}".lstrip(".")) for key, v in value.items()}
    elif is_sequence_type(kind):
        correct = isinstance(value, list | tuple)
        if correct:
            items = _item_types(kind, len(value), path)
            read = [
                _read_value(i, v, strict, f"{path}[{n}]") for n, (i, v) in enumerate(zip(items, value, strict=True))
            ]
            return tuple(read) if (origin or kind) is tuple else read
    elif kind is float:
        correct = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind is int:
        correct = isinstance(value, int) and not isinstance(value, bool)
    else:
        correct = isinstance(value, str if kind is Path else kind)
    if not correct:
        raise ValueError(f"{path}: it is {value!r}, not {_describe_kind(kind)}")
    return Path(value) if kind is Path else value


def is_mapping_type(type_hint: Any) -> bool:
    """Return whether a type hint is a mapping, which is an object in JSON."""
    return inspect.isclass(origin := get_origin(type_hint) or type_hint) and issubclass(origin, Mapping)


def is_sequence_type(type_hint: Any) -> bool:
    """Return whether a type hint is a list or a tuple, which is an array in JSON."""
    return (
        inspect.isclass(origin := get_origin(type_hint) or type_hint)
        and issubclass(origin, Sequence)
        and origin is not str
    )


def _item_types(kind: Any, count: int, path: str) -> list[Any]:
    """Return the type of each item of a sequence with `count` items."""
    args = get_args(kind) or (Any, ...)
    if (get_origin(kind) or kind) is not tuple or args[-1] is ...:
        return [args[0]] * count
    if len(args) != count:
        raise ValueError(f"{path}: it has {count} items, not {len(args)}")
    return list(args)


def _describe_kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    name = (
        "object" if is_mapping_type(kind) else "array" if is_sequence_type(kind) else JSON_TYPE_NAMES.get(kind, "any")
    )
    return f"of the type {name}"


def _list_keys(cls: Any) -> list[str]:
    keys: list[str] = []
    for field, kind in list_json_fields_with_types(cls):
        if field.metadata.get("inline") and (inner := unwrap_optional_dataclass(kind)) is not None:
            keys += _list_keys(inner)
        else:
            keys += [
                get_json_key(field) + suffix for suffix in (find_json_suffixes_by_field(kind) or {"": ""}).values()
            ]
    return keys
