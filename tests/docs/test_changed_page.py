"""The table in docs/changed.md is that of the tests' cases."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_table_is_made_from_the_cases():
    page = runpy.run_path(str(DOCS / "internals/make_changed.py"))["make_page"]()
    assert (DOCS / "changed.md").read_text() == page, "run python docs/internals/make_changed.py"
