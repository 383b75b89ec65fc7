"""The tables of speeds and of rewards are what their scripts write from recorded figures."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/internals/make_speed.py"))


@pytest.mark.parametrize("page", SCRIPT["PAGES"])
def test_page_is_fresh(page):
    assert (ROOT / page).read_text("utf-8") == SCRIPT["make_page"](page)


def test_rewards_are_fresh():
    script = runpy.run_path(str(ROOT / "docs/internals/make_grpo_tasks.py"))
    assert script["PAGE"].read_text("utf-8") == script["make_page"]()
