"""The pages in docs/methods: each method has one, with its fields as the config declares them."""

import re
import runpy
from pathlib import Path

import pytest

from slimtune.core.adapters.peft_config import PeftConfig

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "internals/make_methods.py"))


def test_pages_and_lists_are_current():
    """Only the tables that are computed change: the script would write every other line as it is."""
    files = SCRIPT["make_files"]()
    stale = [str(file) for file, text in files.items() if not file.exists() or file.read_text() != text]
    assert stale == [], "run python docs/internals/make_methods.py"
    assert [str(file) for file, text in files.items() if "TODO" in text] == []


def test_a_new_method_gets_a_page_with_its_fields():
    tilt = runpy.run_path(str(HERE / "outsider/tilt.py"))["TiltConfig"]
    page = SCRIPT["make_page"](tilt, None)
    assert page.startswith("# Tilt\n")
    assert "| `shift` | `False` | also train a shift of each output |\n\n**Export**" in page
    assert SCRIPT["make_page"](tilt, page) == page


def test_a_page_of_a_method_without_fields_has_no_table():
    assert SCRIPT["make_page"](PeftConfig, "**Export**: merged.\n") == "**Export**: merged.\n"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_each_table_occurs_once(page):
    """A script that writes one table leaves the others of the page alone."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE)
    assert [t for t in tables if tables.count(t) > 1] == []
