"""The `method` and `task` sections: their fields, short names, ranges and defaults are those that the class declares.

Nothing here knows a method or an objective by name.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..adapters.config_fields import FieldError, SettingSpec, list_settings, parse_section_settings
from ..adapters.method_registry import get_method_config_class
from .objective_registry import load_objective_class


def list_recipe_method_fields(cls: Any) -> dict[str, SettingSpec]:
    """Return the fields of a method's config class that a recipe may set, by name: not those of one process."""
    return {s.name: s for s in list_settings(cls) if s.declared and s.name != "inference_mode"}


def get_full_method_field_names(name: str) -> dict[str, str]:
    """Return the full names of a method's fields by their names and short names; none for an unknown method."""
    try:
        cls = get_method_config_class(name)
    except ConfigError:
        return {}
    return {**{f: f for f in list_recipe_method_fields(cls)}, **cls.short_names}


def fill_method_defaults(settings: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """Return a method's settings with the defaults that recipes use; some are computed from the other settings."""
    defaults = cls.recipe_defaults
    filled = {**{k: v for k, v in defaults.items() if not callable(v)}, **settings}
    computed = {k: v(filled) for k, v in defaults.items() if callable(v) and k not in filled}
    order = list(list_recipe_method_fields(cls))
    return dict(sorted({**filled, **computed}.items(), key=lambda item: order.index(item[0])))


def parse_method_section(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return name and settings of a `method` section, with full names and all defaults, and every error in it."""
    name = given.get("name", "lora")
    try:
        cls = get_method_config_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("method.name", e.message, e.expected)]
    own = {field: value for field, value in given.items() if field != "name"}
    values, errors = parse_section_settings(list_recipe_method_fields(cls), own, "method", cls.short_names)
    settings = fill_method_defaults(values, cls)
    return {"name": cls.name, "settings": settings}, errors + _find_conflicts(cls, settings, "method", errors)


def parse_task_section(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return name and settings of a `task` section, with all defaults, and every error in it."""
    name = given.get("name", "sft")
    try:
        cls: Any = load_objective_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("task.name", e.message, e.expected)]
    known = {s.name: s for s in list_settings(cls)}
    own = {field: value for field, value in given.items() if field != "name"}
    values, errors = parse_section_settings(known, own, "task")
    settings = {field: values.get(field, spec.default) for field, spec in known.items()}
    return {"name": name, "settings": settings}, errors + _find_conflicts(cls, settings, "task", errors)


def _find_conflicts(cls: Any, settings: Mapping[str, Any], section: str, errors: list[FieldError]) -> list[FieldError]:
    found = [error.within(section) for error in cls.find_errors(settings)]
    return [error for error in found if error.field not in {e.field for e in errors}]
