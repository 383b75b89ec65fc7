"""The methods by name: one file in `slimtune/methods/` is one method, and the file's name is its entry.

A method's file holds a config class (a `PeftConfig`) whose `name` is the file's name, and what the method adds.
Third parties register theirs through the entry point group `slimtune.methods`: `name = "package.module"`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..errors import ConfigError, format_names, nearest

# The room above this one is known by its place alone.
_FOLDER = Path(__file__).parent.parent / "methods"
_ROOM = f"{__package__.rpartition('.')[0]}.methods"


@cache
def built_in_methods() -> dict[str, Path]:
    """Return the file of each built-in method by the method's name, sorted."""
    files = [f for f in _FOLDER.iterdir() if f.suffix == ".py" and f.stem != "__init__"]
    files += [f / "__init__.py" for f in _FOLDER.iterdir() if (f / "__init__.py").is_file()]
    return dict(sorted((f.parent.name if f.stem == "__init__" else f.stem, f) for f in files))


@cache
def method_names() -> tuple[str, ...]:
    """Return the names of every method that can be used here, built-in and plugged in, sorted."""
    return tuple(sorted({*built_in_methods(), *(e.name for e in entry_points(group="slimtune.methods"))}))


@cache
def config_class_paths() -> dict[str, str]:
    """Return the module of each built-in config class by the class's name, without importing any."""
    found = {}
    for name, file in built_in_methods().items():
        for cls in re.findall(r"^class (\w+Config)\(", file.read_text(), re.MULTILINE):
            found[cls] = f"methods.{name}"
    return found


def config_class(name: str) -> Any:
    """Return the config class of the method called `name` (`"lora"`; PEFT's `"LORA"` is the same).

    Raises:
        ConfigError: there is no such method; the known ones and the nearest name are given.
    """
    wanted = str(name).lower()
    outside = {e.name: e for e in entry_points(group="slimtune.methods")}
    if wanted in outside:
        module = importlib.import_module(outside[wanted].value)
    elif wanted in method_names():
        module = importlib.import_module(f"{_ROOM}.{wanted}")
    else:
        raise ConfigError(
            f"there is no method {name!r}{nearest(wanted, method_names())}", f"one of {format_names(method_names())}"
        )
    # By its marks: configs read their files through this function, so that it cannot know their class.
    found = [c for c in vars(module).values() if hasattr(c, "peft_type") and getattr(c, "name", None) == wanted]
    if not found:
        raise ConfigError(f"{module.__name__} holds no PeftConfig whose name is {wanted!r}")
    return found[0]
