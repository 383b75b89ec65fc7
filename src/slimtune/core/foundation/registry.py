"""How the core reaches a part around it: by a name in a registry.

The core imports no part. `slimtune/parts.py` says which parts there are and where: it calls `register_parts` with a
dotted path for each name. A part is imported when it is first asked for. Other packages add parts through an entry
point group of the registry's name.

    core        ROW_FORMATS: Registry[RowFormat] = Registry("slimtune.row_formats", "data format")
    parts.py    register_parts("slimtune.row_formats", {"chat": "slimtune.extras.row_formats.chats:CHAT"})
    core        ROW_FORMATS.load("chat")
"""

import importlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from ...errors import ConfigError, format_names, suggest

T = TypeVar("T")
_PATHS: dict[str, dict[str, str]] = {}


def register_parts(group: str, paths: Mapping[str, str]) -> None:
    """Add parts to a registry: the dotted path of each, "package.module" or "package.module:attribute", by its name."""
    _PATHS.setdefault(group, {}).update(paths)


@cache
def _find_entry_points(group: str) -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=group)}


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        group: name of the registry, and of the entry point group by which other packages add to it.
        kind: what a part is, for messages ("method").
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group, self.kind = group, kind

    def paths(self) -> dict[str, str]:
        """Return the dotted path of each part by its name, in the order in which they were registered."""
        return {**_PATHS.get(self.group, {}), **_find_entry_points(self.group)}

    def names(self) -> tuple[str, ...]:
        """Return the names of all parts; none is imported."""
        return tuple(self.paths())

    def built_in_names(self) -> tuple[str, ...]:
        """Return the names of the parts that slimtune itself brings; none is imported."""
        return tuple(_PATHS.get(self.group, {}))

    def load(self, name: str) -> T:
        """Import the part with this name and return it.

        Raises:
            ConfigError: there is none; the error names the known ones and the nearest.
        """
        paths = self.paths()
        if name not in tuple(paths):  # a recipe may give a name that cannot be hashed
            message = f"there is no {self.kind} {name!r}{suggest(name, paths)}"
            raise ConfigError(message, f"one of {format_names(paths)}")
        module, _, attribute = paths[name].partition(":")
        part: Any = importlib.import_module(module)
        return getattr(part, attribute) if attribute else part

    def load_class(self, name: str) -> Any:
        """Import the module with this name and return the class in it that has the name, too; errors as for `load`."""
        module = self.load(name)
        for value in vars(module).values():
            if isinstance(value, type) and getattr(value, "name", None) == name:
                return value
        raise ConfigError(f"{self.paths()[name]} defines no {self.kind} whose name is {name!r}")

    def load_all(self) -> dict[str, T]:
        """Import all parts and return them by name."""
        return {name: self.load(name) for name in self.names()}
