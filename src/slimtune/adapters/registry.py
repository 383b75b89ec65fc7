"""The registry of methods: one file in `slimtune/methods/` is one method, and the file's name is the method's name.

A method's file defines a config class (a `PeftConfig`) whose `name` is the file's name, and the modules it builds.
Third parties register methods through the entry point group `slimtune.methods`: `name = "package.module"`.
"""

import importlib
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..errors import ConfigError, format_names, nearest

# Methods import this package, so their package is found by its path instead of an import.
_METHODS_FOLDER = Path(__file__).parent.parent / "methods"
_METHODS_PACKAGE = f"{__package__.rpartition('.')[0]}.methods"


@cache
def built_in_methods() -> dict[str, Path]:
    """Return the file of each built-in method by the method's name, sorted."""
    files = [f for f in _METHODS_FOLDER.iterdir() if f.suffix == ".py" and f.stem != "__init__"]
    files += [f / "__init__.py" for f in _METHODS_FOLDER.iterdir() if (f / "__init__.py").is_file()]
    return dict(sorted((f.parent.name if f.stem == "__init__" else f.stem, f) for f in files))


@cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built-in and registered by entry points, sorted."""
    return tuple(sorted({*built_in_methods(), *(e.name for e in entry_points(group="slimtune.methods"))}))


@cache
def config_class_paths() -> dict[str, str]:
    """Return the module of each built-in config class by the class's name, without importing any."""
    return {
        class_name: f"methods.{name}"
        for name, file in built_in_methods().items()
        for class_name in re.findall(r"^class (\w+Config)\(", file.read_text(), re.MULTILINE)
    }


def config_class(name: str) -> Any:
    """Return the config class of a method, such as `"lora"` or PEFT's `"LORA"`.

    Raises:
        ConfigError: there is no such method; the error names the known ones and the nearest.
    """
    method = str(name).lower()
    external = {e.name: e for e in entry_points(group="slimtune.methods")}
    if method in external:
        module = importlib.import_module(external[method].value)
    elif method in method_names():
        module = importlib.import_module(f"{_METHODS_PACKAGE}.{method}")
    else:
        raise ConfigError(
            f"there is no method {name!r}{nearest(method, method_names())}", f"one of {format_names(method_names())}"
        )
    # Recognized by attributes: the config base class imports this module, so its class is not available here.
    classes = [c for c in vars(module).values() if hasattr(c, "peft_type") and getattr(c, "name", None) == method]
    if not classes:
        raise ConfigError(f"{module.__name__} defines no PeftConfig whose name is {method!r}")
    return classes[0]
