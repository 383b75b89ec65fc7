"""The page about Python has every public name, and its example uses names that exist."""

import importlib
import re
import runpy
from pathlib import Path

import slimtune

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


def test_page_is_current():
    make_page = runpy.run_path(str(DOCS / "internals/make_api.py"))["make_page"]
    assert make_page() == PAGE, "run python docs/internals/make_api.py"


def test_every_public_name_is_on_the_page():
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", PAGE, re.MULTILINE)}
    shown |= set(re.findall(r"`(\w+)`", PAGE))
    assert [name for name in slimtune.__all__ if name not in shown] == []


def test_imports_of_the_examples_exist():
    for module, names in re.findall(r"^from (slimtune\S*) import (.+)$", PAGE, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
