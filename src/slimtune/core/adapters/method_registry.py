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
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ...errors import ConfigError, format_names, nearest
from .config_fields import FieldSpec

# Methods import this package, so their package is found by its path instead of an import.
_METHODS_PACKAGE = "slimtune.methods"
_METHODS_FOLDER = Path(__file__).parents[2] / "methods"


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
def _find_registered_modules() -> dict[str, str]:
    """Return the modules of the methods that other packages register, by the methods' names."""
    return {e.name: e.value for e in entry_points(group="slimtune.methods")}


@cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built-in and registered by entry points, sorted."""
    return tuple(sorted({*find_built_in_method_files(), *_find_registered_modules()}))


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
    fields: dict[str, FieldSpec]  # only types, defaults, ranges and choices that are literals; help is left out


@cache
def parse_config_classes() -> dict[str, ConfigSource]:
    """Return the sources of the built-in config classes by method, sorted.

    Nothing is imported: a method's module imports torch, which takes seconds. A class's bases are in its own module,
    in those below, or in the module of a method before it in the alphabet.
    """
    found: dict[str, ConfigSource] = {}
    classes: dict[str, ConfigSource] = {}
    shared = [Path(__file__).with_name(f"{name}.py") for name in ("peft_config", "prompt")]
    for file in [*shared, *find_built_in_method_files().values()]:
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in (n for n in module.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")):
            constants: dict[str, Any] = {}
            fields: dict[str, FieldSpec] = {}
            for base in node.bases:
                inherited = classes.get(ast.unparse(base).rpartition(".")[2])
                constants |= inherited.constants if inherited else {}
                fields |= inherited.fields if inherited else {}
            for line in node.body:
                if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                    continue
                if not ast.unparse(line.annotation).startswith("ClassVar"):
                    fields[line.target.id] = _read_field(line.target.id, line)
                    continue
                constants.pop(line.target.id, None)
                with contextlib.suppress(ValueError):
                    constants[line.target.id] = ast.literal_eval(line.value or ast.Constant(None))
            doc, module_doc = ast.get_docstring(node) or "", ast.get_docstring(module) or ""
            classes[node.name] = ConfigSource(doc, module_doc, constants, fields)
            if name := constants.get("name"):
                found[name] = classes[node.name]
    return dict(sorted(found.items()))


def _read_field(name: str, line: ast.AnnAssign) -> FieldSpec:
    """Return the spec of a field from its source; it accepts what the source does not tell."""
    call = line.value
    try:
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "setting":
            return FieldSpec(name, Any, None, declared=False)
        given = {k.arg: k.value for k in call.keywords}
        factory = ast.unparse(given.get("default_factory", ast.Constant("")))
        default = {"list": [], "dict": {}}[factory] if "default_factory" in given else ast.literal_eval(call.args[0])
        bounds = {str(b): ast.literal_eval(given[b]) for b in ("ge", "gt", "le", "lt") if b in given}
        hint = _read_type(line.annotation)
        literals = [t for t in (hint, *get_args(hint)) if get_origin(t) is Literal]
        choices = tuple(c for t in literals for c in get_args(t) if isinstance(c, str))
        return FieldSpec(name, hint, default, bounds=bounds, choices=() if "choices" in given else choices)
    except (KeyError, LookupError, TypeError, ValueError):  # no literal
        return FieldSpec(name, Any, None, declared=False)


def _read_type(node: ast.expr) -> Any:
    """Return the type that an annotation of plain types, list, dict, Literal and `|` describes."""
    match node:
        case ast.Constant(None):
            return None
        case ast.Name("Any"):
            return Any
        case ast.Name(name):
            return {"bool": bool, "int": int, "float": float, "str": str}[name]
        case ast.BinOp(left, ast.BitOr(), right):
            return _read_type(left) | _read_type(right)
        case ast.Subscript(ast.Name("Literal"), values):
            return Literal[ast.literal_eval(values)]
        case ast.Subscript(ast.Name("list"), item):
            return list[_read_type(item)]  # type: ignore[misc]
        case ast.Subscript(ast.Name("dict"), ast.Tuple([key, item])):
            return dict[_read_type(key), _read_type(item)]  # type: ignore[misc]
    raise ValueError(ast.unparse(node))


def require_method(name: str) -> str:
    """Return the name of a method in lower case, without importing it; `"lora"` for PEFT's `"LORA"`.

    Raises:
        ConfigError: there is no such method; the error names the known ones and the nearest.
    """
    method, known = str(name).lower(), method_names()
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
    module = importlib.import_module(_find_registered_modules().get(method, f"{_METHODS_PACKAGE}.{method}"))
    # Recognized by attributes: the config base class imports this module, so its class is not available here.
    classes = [c for c in vars(module).values() if hasattr(c, "peft_type") and getattr(c, "name", None) == method]
    if not classes:
        raise ConfigError(f"{module.__name__} defines no PeftConfig whose name is {method!r}")
    return classes[0]
