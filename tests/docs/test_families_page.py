"""docs/families.md is printed from what the tests of the families found."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_printed_from_the_results():
    page = runpy.run_path(str(DOCS / "internals/make_families.py"))["make_page"]()
    assert (DOCS / "families.md").read_text() == page, "run python docs/internals/make_families.py"
