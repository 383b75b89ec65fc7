"""The registry of methods: one file in `slimtune/methods/` is one method, and the file's name is the method's name.

A method's file defines a config class (a `PeftConfig`) whose `name` is the file's name, and the modules it builds.
Third parties register methods through the entry point group `slimtune.methods`: `name = "package.module"`.
"""

import ast
import contextlib
import importlib
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, format_names, nearest

# Methods import this package, so their package is found by its path instead of an import.
_METHODS_FOLDER = Path(__file__).parent.parent / "methods"
_METHODS_PACKAGE = f"{__package__.rpartition('.')[0]}.methods"


ALIASES = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}
"""Short names of methods in other tools."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
"""Names of papers about one setting of a method: the method, and the setting."""


@cache
def find_built_in_method_files() -> dict[str, Path]:
    """Return the file of each built-in method by the method's name, sorted."""
    files = {f.stem: f for f in _METHODS_FOLDER.glob("*.py") if f.stem != "__init__"}
    return dict(sorted((files | {f.parent.name: f for f in _METHODS_FOLDER.glob("*/__init__.py")}).items()))


@cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built-in and registered by entry points, sorted."""
    return tuple(sorted({*find_built_in_method_files(), *(e.name for e in entry_points(group="slimtune.methods"))}))


@cache
def config_class_paths() -> dict[str, str]:
    """Return the module of each built-in config class by the class's name, without importing any."""
    return {
        class_name: f"methods.{name}"
        for name, file in find_built_in_method_files().items()
        for class_name in re.findall(r"^class (\w+Config)\(", file.read_text(), re.MULTILINE)
    }


class ConfigSource(NamedTuple):
    """What the source of a config class says; constants that are no literals are left out."""

    doc: str
    module_doc: str
    constants: dict[str, Any]
    fields: tuple[str, ...]


@cache
def read_config_sources() -> dict[str, ConfigSource]:
    """Return the sources of the built-in config classes by method, sorted.

    Nothing is imported: a method's module imports torch, which takes seconds. A class's bases are in its own module,
    in those below, or in the module of a method before it in the alphabet.
    """
    found: dict[str, ConfigSource] = {}
    classes: dict[str, ConfigSource] = {}
    shared = [Path(__file__).with_name(f"{name}.py") for name in ("config", "prompt")]
    for file in [*shared, *find_built_in_method_files().values()]:
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in (n for n in module.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")):
            constants: dict[str, Any] = {}
            fields: dict[str, None] = {}
            for base in node.bases:
                inherited = classes.get(ast.unparse(base).rpartition(".")[2])
                constants |= inherited.constants if inherited else {}
                fields |= dict.fromkeys(inherited.fields if inherited else ())
            for line in node.body:
                if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                    continue
                if not ast.unparse(line.annotation).startswith("ClassVar"):
                    fields[line.target.id] = None
                    continue
                constants.pop(line.target.id, None)
                with contextlib.suppress(ValueError):
                    constants[line.target.id] = ast.literal_eval(line.value or ast.Constant(None))
            doc, module_doc = ast.get_docstring(node) or "", ast.get_docstring(module) or ""
            classes[node.name] = ConfigSource(doc, module_doc, constants, tuple(fields))
            if name := constants.get("name"):
                found[name] = classes[node.name]
    return dict(sorted(found.items()))


def require_method(name: str) -> str:
    """Return the name of a method in lower case, without importing it; `"lora"` for PEFT's `"LORA"`.

    Raises:
        ConfigError: there is no such method; the error names the known ones and the nearest.
    """
    method = str(name).lower()
    known = sorted({*method_names(), *(e.name for e in entry_points(group="slimtune.methods"))})
    if method not in known and method in {*ALIASES, *VARIANTS, "qlora"}:
        variant_of, settings = VARIANTS.get(method, (ALIASES.get(method, "lora"), {}))
        flags = "".join(f" --set method.{k}={str(v).lower()}" for k, v in settings.items())
        flags += " --quantization nf4" if method == "qlora" else ""
        raise ConfigError(f"there is no method {name!r}: it is a setting", f"--method {variant_of}{flags}")
    if method not in known:
        raise ConfigError(f"there is no method {name!r}{nearest(method, known)}", f"one of {format_names(known)}")
    return method


def config_class(name: str) -> Any:
    """Return the config class of a method; name and errors as for `require_method`."""
    method = require_method(name)
    external = {e.name: e.value for e in entry_points(group="slimtune.methods")}
    module = importlib.import_module(external.get(method, f"{_METHODS_PACKAGE}.{method}"))
    # Recognized by attributes: the config base class imports this module, so its class is not available here.
    classes = [c for c in vars(module).values() if hasattr(c, "peft_type") and getattr(c, "name", None) == method]
    if not classes:
        raise ConfigError(f"{module.__name__} defines no PeftConfig whose name is {method!r}")
    return classes[0]
