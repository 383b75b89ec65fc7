"""The tables of speeds are what their script writes from the recorded figures."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/internals/make_speed.py"))


@pytest.mark.parametrize("page", SCRIPT["PAGES"])
def test_page_is_fresh(page):
    assert (ROOT / page).read_text("utf-8") == SCRIPT["make_page"](page)
