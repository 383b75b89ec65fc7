"""Faults of a recipe: each with its dotted path, what was got and what is wanted; all are reported in one error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import RecipeError, format_names, nearest


@dataclass(frozen=True)
class FieldError:
    """One fault at `path`: what was got, and what is wanted there."""

    path: str
    got: str
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.got}" + (f"; expected: {self.expected}" if self.expected else "")


def raise_all(faults: Iterable[FieldError], source: str) -> None:
    """Raise one RecipeError that names every fault; nothing where there is none."""
    every = list(faults)
    if every:
        number = "a fault" if len(every) == 1 else f"{len(every)} faults"
        lines = "".join(f"\n  {fault}" for fault in every)
        raise RecipeError(
            f"{source} holds {number}:{lines}", hint="correct it there, or override it: --set path.to.field=value"
        )


def fields_of(tree: type[BaseModel], under: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield `(dotted path, field)` for every field of a tree that is no section itself."""
    for name, info in tree.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{under}{name}.")
        else:
            yield f"{under}{name}", info


def flag_of(info: FieldInfo) -> str:
    """Return the flag of `slimtune train` that sets this field, or `""`."""
    extra = info.json_schema_extra
    return str(extra.get("flag", "")) if isinstance(extra, dict) else ""


def format_value(value: object, most: int = 60) -> str:
    """Return a value as one short piece of text."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def unknown(name: str, section: str, here: Iterable[str], everywhere: Iterable[str]) -> FieldError:
    """Return the fault of a field that is not in `section`: its like in another section, else the nearest here.

    Args:
        name: the field that is not known.
        section: the dotted path it stands in; `""` for the root.
        here: the names the section knows.
        everywhere: the dotted paths of every field.
    """
    elsewhere = {path.rpartition(".")[2]: path for path in everywhere}
    near = f"; did you mean {elsewhere[name]!r}?" if name in elsewhere else nearest(name, here)
    wanted = "" if near else f"one of {format_names(here, 40)}"
    return FieldError(f"{section}.{name}" if section else name, f"no such field{near}", wanted)


def collect_field_errors(error: ValidationError, tree: type[BaseModel], everywhere: Iterable[str]) -> list[FieldError]:
    """Return pydantic's errors as faults, in the words of the fields' descriptions."""
    known = dict(fields_of(tree))
    found = []
    for e in error.errors():
        parts = [str(p) for p in e["loc"]]
        # An item of a list is at fault for its field.
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), ".".join(parts))
        if e["type"] == "extra_forbidden":
            section = ".".join(parts[:-1])
            here = _names_in(tree, parts[:-1])
            found.append(unknown(parts[-1], section, here, everywhere))
        elif e["type"] == "missing":
            found += [_missing(p, info) for p, info in known.items() if _required_at(p, info, path)]
        elif path in known:
            found.append(FieldError(path, f"got {format_value(e['input'])}", known[path].description or ""))
        else:
            found.append(
                FieldError(
                    path,
                    f"got {format_value(e['input'])}",
                    f"a section with {format_names(_names_in(tree, parts), 40)}",
                )
            )
    return found


def _names_in(tree: type[BaseModel], parts: list[str]) -> list[str]:
    for part in parts:
        inner = tree.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        tree = inner
    return list(tree.model_fields)


def _required_at(path: str, info: FieldInfo, missing: str) -> bool:
    # A whole section that is missing is said by the fields in it that are needed.
    return info.is_required() and (path == missing or path.startswith(f"{missing}."))


def _missing(path: str, info: FieldInfo) -> FieldError:
    flag = flag_of(info)
    return FieldError(path, "missing" + (f" (flag {flag})" if flag else ""), info.description or "")
