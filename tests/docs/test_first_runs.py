"""The page of first runs is what its script writes from the recorded runs."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_is_fresh():
    script = runpy.run_path(str(ROOT / "docs/internals/make_first_runs.py"))
    assert script["PAGE"].read_text("utf-8") == script["make_page"]()
