"""`slimtune methods`: what can be trained, and each method's fields, read from the classes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .common import Json, console, table


def methods(as_json: Json = False) -> dict[str, Any]:
    """List the methods and their fields."""
    from ..methods import config_class, names

    found = [_described(name, config_class(name)) for name in names()]
    if not as_json:
        screen = console()
        for method in found:
            screen.print(method["name"], style="bold", end="  ")
            screen.print(method["summary"], markup=False)
            rows = table("  field", "recipe's default", "flag or short name")
            for f in method["fields"]:
                rows.add_row(f"  {f['name']}", f["recipe_default"], f["short_name"] or "")
            screen.print(rows)
    return {"methods": found}


def _described(name: str, cls: type) -> dict[str, Any]:
    from ..recipe.method import known_fields, resolved

    short = {full: s for s, full in getattr(cls, "short_names", {}).items()}
    defaults = resolved({}, cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return {
        "name": name,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "fields": [
            {
                "name": n,
                "type": str(fields[n].type),
                "default": repr(_default(fields[n])),
                "recipe_default": repr(defaults.get(n, _default(fields[n]))),
                "short_name": short.get(n),
            }
            for n in known_fields(cls)
        ],
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "needed"
