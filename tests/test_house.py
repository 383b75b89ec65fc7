"""The house's own rules, where no tool holds them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import slimtune
import slimtune.methods
from slimtune.adapters.config import PeftConfig

SOURCE = Path(slimtune.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def shown(file):
    return str(file.relative_to(SOURCE))


def test_import_slimtune_is_light():
    heavy = ["torch", "transformers", "peft", "datasets", "accelerate"]
    check = f"import sys, slimtune, slimtune.cli; dir(slimtune); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_is_there_and_sorted():
    assert slimtune.__all__ == sorted(slimtune.__all__)
    assert len(set(slimtune.__all__)) == len(slimtune.__all__)
    for name in slimtune.__all__:
        assert getattr(slimtune, name).__doc__, name
    assert set(slimtune.__all__) <= set(dir(slimtune))
    with pytest.raises(AttributeError, match="no attribute 'LoraConfi'"):
        slimtune.LoraConfi  # noqa: B018


@pytest.mark.parametrize("name", slimtune.methods.method_names())
def test_one_file_is_one_method(name):
    module = importlib.import_module(f"slimtune.methods.{name}")
    configs = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, PeftConfig) and c.__module__ == module.__name__
    ]
    assert [c.name for c in configs] == [name]
    (config,) = configs
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        home = next(c for c in config.__mro__ if field.name in vars(c).get("__annotations__", {}))
        assert f" {field.name}:" in home.__doc__, f"{home.__name__} does not say what {field.name} is"


@pytest.mark.parametrize("file", FILES, ids=shown)
def test_nothing_of_ours_is_a_pickle(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            assert name.partition(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib", "shelve"), name
            assert name not in ("torch.save", "torch.load"), name


@pytest.mark.parametrize("file", FILES, ids=shown)
def test_the_idea_stands_at_the_top(file):
    assert not file.read_text().strip() or ast.get_docstring(ast.parse(file.read_text())), "a module's docstring"
