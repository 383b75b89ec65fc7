"""The `task` section: its fields are those that the objective's class declares. Nothing here knows one by name."""

from collections.abc import Mapping
from typing import Any

from ..adapters.config_fields import field_specs
from ..errors import ConfigError
from ..objectives import objective_class
from .errors import FieldError, unknown_field_error


def resolve_task(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the `task` section with all defaults, and every error in it."""
    name = given.get("name", "sft")
    try:
        cls: Any = objective_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("task.name", e.message, e.expected)]
    specs = {s.name: s for s in field_specs(cls)}
    errors = [unknown_field_error(f"task.{field}", specs) for field in given if field not in ("name", *specs)]
    values = {field: given.get(field, spec.default) for field, spec in specs.items()}
    for field, spec in specs.items():
        if error := spec.find_error(values[field]):
            message = error.message.replace(f"{field} is ", "got ", 1)
            errors.append(FieldError(f"task.{field}", message, error.expected))
    if not errors:
        try:
            cls(**values)
        except ConfigError as e:
            errors.append(FieldError(f"task.{e.message.split(' ', 1)[0]}", e.message, e.expected))
    return {"name": name, **values}, errors
