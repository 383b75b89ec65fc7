"""The page of silent faults is what the tests' lists and records say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_page_is_as_the_tests_are():
    script = runpy.run_path(str(ROOT / "docs/internals/make_silent_faults.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["make_page"]()
