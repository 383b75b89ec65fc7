"""`peft` as slimtune gives it, for HF PEFT's own tests.

`peft.a.b.Name` is `slimtune.a.b.Name`, else `slimtune.Name`. A name that slimtune lacks and that a test file imports at
its top is a placeholder: using it raises `SlimtuneLacks` in the test, so that the file's other tests run. Any other
missing name is an AttributeError or ImportError, as for a user. Real PEFT is never imported.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from functools import cache
from pathlib import Path

import slimtune
from slimtune.compat import public_names as peft_names

VERSION = "0.21.2+slimtune"


class SlimtuneLacks(Exception):
    """A test uses a name that slimtune lacks. It is no subclass of what tests expect to be raised."""


class Placeholder(type):
    """The class of missing names. At collection, in lists of parameters, using one gives another placeholder."""

    def __call__(cls, *args, **kwargs):
        return cls._use("called", placeholder(f"{cls.path}()"))

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._use(f"attribute {name}", placeholder(f"{cls.path}.{name}"))

    def _use(cls, how, value):
        if os.environ.get("PYTEST_CURRENT_TEST"):
            raise SlimtuneLacks(f"{cls.path} ({how})")
        return value

    def __instancecheck__(cls, obj):
        # Nothing is the config of a missing method; but whether a module is a missing layer class is unknown.
        return False if cls.path.endswith("Config") else cls._use("isinstance", False)

    def __subclasscheck__(cls, other):
        return cls in type.mro(other) if isinstance(other, Placeholder) else False

    def __repr__(cls):
        return f"<slimtune lacks {cls.path}>"

    def __iter__(cls):
        return cls._use("iterated", iter(()))

    def __getitem__(cls, key):
        return cls._use("indexed", cls)

    def __contains__(cls, key):
        return cls._use("searched", False)


@cache
def placeholder(path):
    return Placeholder(path.rpartition(".")[2], (), {"path": path, "__module__": "peft_missing"})


def find_imported_names():
    """Return (module, name) of everything that the test files import from peft at their top."""
    found = set()
    for file in Path(os.environ["PEFT_SUITE_TESTS"]).glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft":
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {tuple(a.name.rpartition(".")[::2]) for a in node.names if a.name.startswith("peft.")}
    return found


IMPORTED = find_imported_names()


@cache
def find_slimtune_module(name):
    """Return `slimtune.a.b` for `peft.a.b`; None if slimtune has no such module."""
    ours = "slimtune" + name.removeprefix("peft")
    try:
        return importlib.import_module(ours)
    except ImportError as e:
        if e.name is None or not f"{ours}.".startswith(f"{e.name}."):
            raise
        return None


def find_name(module, name):
    """Return `module.name`, where module is `peft` or `peft.a.b`."""
    path = f"{module}.{name}"
    if name == "__version__":
        return VERSION
    if name.startswith("__"):
        raise AttributeError(name)
    for home in (find_slimtune_module(module), slimtune):
        value = getattr(home, name, placeholder) if home is not None else placeholder
        if value is not placeholder:
            return importlib.import_module(path) if isinstance(value, types.ModuleType) else value
    if any(m == path or m.startswith(f"{path}.") for m, _ in IMPORTED):
        return importlib.import_module(path)
    if (module, name) in IMPORTED:
        return placeholder(path)
    raise AttributeError(f"slimtune lacks {path}")


class ShimModule(types.ModuleType):
    def __getattr__(self, name):
        return find_name(self.__name__, name)

    def __setattr__(self, name, value):
        """Set what a test patches in slimtune's modules, too: under this path, and where it is defined."""
        if (self.__name__, name) == ("peft.config", "__version__"):
            sys.modules["slimtune.core.adapters.peft_config"].FORMAT_VERSION = value
        elif not name.startswith("__") and not isinstance(value, types.ModuleType):
            homes = {
                find_slimtune_module(self.__name__),
                sys.modules.get(f"slimtune.{peft_names.find_module_of_peft_name(name)}"),
            }
            for home in homes - {None}:
                setattr(home, name, value)
        super().__setattr__(name, value)


class ShimFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("peft."):
            return None
        asked = any(m == name or m.startswith(f"{name}.") or f"{m}.{n}" == name for m, n in IMPORTED)
        if not asked and find_slimtune_module(name) is None:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return ShimModule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, ShimFinder())
sys.modules[__name__].__class__ = ShimModule
