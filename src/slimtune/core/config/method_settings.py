"""The `method` and `task` sections: their fields, short names, ranges and defaults are those that the class declares.

Nothing here knows a method or an objective by name.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..adapters.config_fields import FieldSpec, field_specs
from ..adapters.method_registry import config_class
from .field_errors import FieldError, unknown_field_error
from .objective_registry import objective_class

SET_BY_LIBRARY = (
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_type", "peft_version",
    "runtime_config",
)  # fmt: skip
"""Fields of configs that attaching and saving fill in, or that belong to one process: a recipe cannot set them."""


def method_fields(cls: Any) -> dict[str, FieldSpec]:
    """Return the fields of a method's config class that a recipe may set, by name."""
    return {s.name: s for s in field_specs(cls) if s.name not in SET_BY_LIBRARY}


def accepted_names(name: str) -> list[str]:
    """Return the names and short names of a method's fields; none for an unknown method."""
    try:
        cls = config_class(name)
    except ConfigError:
        return []
    return [*method_fields(cls), *cls.short_names]


def read_names(name: str) -> dict[str, str]:
    """Return the full names of a method's fields by their names and short names; none for an unknown method."""
    try:
        cls = config_class(name)
    except ConfigError:
        return {}
    return {**{f: f for f in method_fields(cls)}, **cls.short_names}


def find_setting_errors(section: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors in a method's settings."""
    return resolve_method(section)[1]


def fill_recipe_defaults(settings: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """Return a method's settings with the defaults that recipes use; some are computed from the other settings."""
    defaults = cls.recipe_defaults
    filled = {**{k: v for k, v in defaults.items() if not callable(v)}, **settings}
    computed = {k: v(filled) for k, v in defaults.items() if callable(v) and k not in filled}
    order = list(method_fields(cls))
    return dict(sorted({**filled, **computed}.items(), key=lambda item: order.index(item[0])))


def resolve_method(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the `method` section with full names and all defaults, and every error in it."""
    name = given.get("name", "lora")
    try:
        cls = config_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("method.name", e.message, e.expected)]
    known = method_fields(cls)
    settings: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field, value in given.items():
        full_name = cls.short_names.get(field, field)
        if field == "name":
            continue
        if full_name not in known:
            errors.append(unknown_field_error(f"method.{field}", [*known, *cls.short_names]))
        elif full_name in settings:
            errors.append(FieldError(f"method.{field}", f"given twice, also as {full_name} or its short name"))
        else:
            settings[full_name] = value
    plain_defaults = {k: v for k, v in cls.recipe_defaults.items() if not callable(v)}
    errors += _find_errors({**plain_defaults, **settings}, cls)
    if not errors:
        settings = fill_recipe_defaults(settings, cls)
        errors = _find_errors(settings, cls)
    return {"name": cls.name, **settings}, errors


def resolve_task(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the `task` section with all defaults, and every error in it."""
    name = given.get("name", "sft")
    try:
        cls: Any = objective_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("task.name", e.message, e.expected)]
    specs = {s.name: s for s in field_specs(cls)}
    values = {field: given.get(field, spec.default) for field, spec in specs.items()}
    errors = [unknown_field_error(f"task.{field}", specs) for field in given if field not in ("name", *specs)]
    errors += [e for field, spec in specs.items() for e in _find_value_errors("task", spec, values[field])]
    if not errors:
        try:
            cls(**values)
        except ConfigError as e:
            errors.append(FieldError(f"task.{e.message.split(' ', 1)[0]}", e.message, e.expected))
    return {"name": name, **values}, errors


def _find_value_errors(section: str, spec: FieldSpec, value: object) -> list[FieldError]:
    if not (error := spec.find_error(value)):
        return []
    return [FieldError(f"{section}.{spec.name}", error.message.replace(f"{spec.name} is ", "got ", 1), error.expected)]


def _find_errors(settings: dict[str, Any], cls: Any) -> list[FieldError]:
    # The class raises at its first error. Take that field out and try again until no error is left.
    errors: list[FieldError] = []
    settings = dict(settings)
    while True:
        try:
            # The class as it is: calling it would import peft, which takes seconds.
            type.__call__(cls, **settings).check_required()
            return errors
        except ConfigError as e:
            name, expected = e.message.split(" ", 1)[0].strip("`:"), "; ".join(filter(None, (e.expected, e.hint)))
            if name not in settings:
                return [*errors, FieldError("method", e.message, expected)]
            message = e.message.removeprefix(f"{name}: ").replace(f"{name} is ", "got ", 1)
            errors.append(FieldError(f"method.{name}", message, expected))
            default, value = cls.recipe_defaults.get(name), settings.pop(name)
            if default is not None and not callable(default) and value not in (None, default):
                settings[name] = default  # a required field must stay
