"""The methods: one file is one method, and the file's name is its entry in the registry.

A method's file holds a config class (a `PeftConfig`) whose `name` is the file's name, and what the method adds.
Third parties register theirs through the entry point group `slimtune.methods`: `name = "package.module"`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from ..errors import ConfigError, listed, nearest
from .config import PeftConfig

_NOT_METHODS = {"config", "contract", "patterns"}


@cache
def names() -> tuple[str, ...]:
    """Return the names of every method that can be used here, built-in and plugged in, sorted."""
    built_in = {m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS}
    return tuple(sorted(built_in | {e.name for e in entry_points(group="slimtune.methods")}))


def config_class(name: str) -> type[PeftConfig]:
    """Return the config class of the method called `name` (`"lora"`; PEFT's `"LORA"` is the same).

    Raises:
        ConfigError: there is no such method; the known ones and the nearest name are given.
    """
    wanted = str(name).lower()
    outside = {e.name: e for e in entry_points(group="slimtune.methods")}
    if wanted in outside:
        module = importlib.import_module(outside[wanted].value)
    elif wanted in names():
        module = importlib.import_module(f"{__name__}.{wanted}")
    else:
        raise ConfigError(f"there is no method {name!r}{nearest(wanted, names())}", f"one of {listed(names())}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PeftConfig) and c.name == wanted]
    if not found:
        raise ConfigError(f"{module.__name__} holds no PeftConfig whose name is {wanted!r}")
    return found[0]
