"""The `method` and `task` sections: their fields, short names, ranges and defaults are those that the class declares.

Nothing here knows a method or an objective by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ..adapters.config_fields import (
    FieldError,
    SettingSpec,
    list_settings,
    map_settings_by_name,
    read_section_and_errors,
)
from ..adapters.method_registry import get_method_config_class
from .objective_registry import load_objective_class
from .schema import MethodSettings, NamedSettings, TaskSettings


def map_method_setting_specs_by_name(method_name: str) -> dict[str, SettingSpec]:
    """Return a method's fields by their names and short names; none for an unknown method."""
    try:
        return map_settings_by_name(get_method_config_class(method_name))
    except ConfigError:
        return {}


def fill_recipe_defaults(given_settings: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Return a method's settings with the defaults that recipes use; some are computed from the other settings."""
    defaults = config_class.recipe_defaults
    filled = {**{k: v for k, v in defaults.items() if not callable(v)}, **given_settings}
    filled |= {k: v(filled) for k, v in defaults.items() if callable(v) and k not in filled}
    return {s.name: filled[s.name] for s in list_settings(config_class) if s.name in filled}


def fill_objective_setting_defaults(objective_settings: Mapping[str, Any], objective_class: Any) -> dict[str, Any]:
    """Return an objective's settings with all its defaults."""
    return {s.name: objective_settings.get(s.name, s.default) for s in list_settings(objective_class)}


NAMED_SECTIONS: dict[str, tuple[type[NamedSettings], Callable[[str], Any], Callable[..., dict[str, Any]]]] = {
    "method": (MethodSettings, get_method_config_class, fill_recipe_defaults),
    "task": (TaskSettings, load_objective_class, fill_objective_setting_defaults),
}
"""How a section is read: its class, what returns the class that declares its settings, and what adds defaults."""


def read_method_or_task_and_errors(section: str, given: Mapping[str, Any]) -> tuple[NamedSettings, list[FieldError]]:
    """Return the `method` or `task` section that a recipe describes, with all defaults, and every error in it."""
    kind, load_class, fill_defaults = NAMED_SECTIONS[section]
    name = given.get("name", kind.name)
    try:
        cls = load_class(name)
    except ConfigError as e:
        return kind(), [FieldError(f"{section}.name", e.message, e.expected)]
    own = {field: value for field, value in given.items() if field != "name"}
    values, errors = read_section_and_errors(map_settings_by_name(cls), own, section)
    settings, faulty = fill_defaults(values, cls), {error.field for error in errors}
    conflicts = [error.within(section) for error in cls.find_errors(settings)]
    return kind(name=cls.name, settings=settings), errors + [e for e in conflicts if e.field not in faulty]
