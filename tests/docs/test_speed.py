"""The tables of speeds and of other benchmarks are what their scripts write from recorded figures."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/internals/make_speed.py"))
TABLES = runpy.run_path(str(ROOT / "docs/internals/make_benchmark_tables.py"))


@pytest.mark.parametrize("page", SCRIPT["PAGES"])
def test_page_is_fresh(page):
    assert (ROOT / page).read_text("utf-8") == SCRIPT["make_page"](page)


@pytest.mark.parametrize("page", TABLES["PAGES"])
def test_benchmark_table_is_fresh(page):
    assert (ROOT / page).read_text("utf-8") == TABLES["make_page"](page)
