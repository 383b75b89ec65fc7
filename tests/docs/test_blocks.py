"""What console blocks of README and docs show is what the commands print today."""

import re
import runpy
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/internals/make_blocks.py"))
MEND = "python docs/internals/make_blocks.py "
MACHINE = re.compile(r"/s\b| [MG]iB|^tuned: |^base: ")
"""Lines whose figures are of the machine, and answers of a model."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def find_differences(old: str, new: str, tolerance: float) -> list[tuple[str, str]]:
    """Return the lines whose words differ, or whose figures differ by more than a share of them."""

    def differs(a: str, b: str) -> bool:
        if MACHINE.search(a):
            return a.split()[:1] != b.split()[:1]
        pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
        far = any(abs(float(x) - float(y)) > tolerance * max(abs(float(x)), 1) for x, y in pairs)
        return far or NUMBER.sub("0", a).split() != NUMBER.sub("0", b).split()

    lines = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    return [(a, b) for a, b in lines if a != b and differs(a, b)]


@pytest.mark.slow
@pytest.mark.parametrize("page", SCRIPT["list_pages"]())
def test_page_shows_what_its_commands_print(page):
    text, pictures = SCRIPT["make_page"](page)
    old = (ROOT / page).read_text()
    if page in SCRIPT["SESSIONS"]:
        assert find_differences(old, text, 0.1) == [], MEND + page
    answers = [SCRIPT["list_answers"](t) for t in (old, text)]
    assert answers[0] == answers[1], MEND + page
    assert {name: (ROOT / name).read_text() for name in pictures} == pictures, MEND + page


@pytest.mark.slow
def test_common_claims_are_what_is_planned_today():
    script = ROOT / "docs/internals/make_claims.py"
    assert runpy.run_path(str(script))["make_page"]() == (ROOT / "docs/plan.md").read_text(), f"python {script}"


def test_changed_figure_is_a_difference():
    assert find_differences("loss 2.9908", "loss 2.9909", 0.1) == []
    assert find_differences("loss 2.9908", "loss 3.9908", 0.1) == [("loss 2.9908", "loss 3.9908")]


def test_lines_after_an_ellipsis_begin_at_the_same_label():
    printed = ["fits", "needs 8 GiB", "speed: 5", "time: 6", "end"]
    assert SCRIPT["choose_lines"](["fits", "…", "speed: 4", "…"], printed) == ["fits", "…", "speed: 5", "…"]


def test_label_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="speed"):
        SCRIPT["choose_lines"](["…", "speed: 4"], ["fits"])


DEMO = runpy.run_path(str(ROOT / "docs/internals/make_demo.py"))


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO["RUN"] / "eval-test.json").exists(), reason="make demo first, as CI does")
def test_readme_says_what_the_demo_measured():
    """Another processor rounds otherwise, by a hundredth or two."""
    written, measured = (
        [float(n) for n in NUMBER.findall(DEMO["SENTENCE"].search(text)[0])]
        for text in ((ROOT / "README.md").read_text(), DEMO["make_readme"]())
    )
    assert written == pytest.approx(measured, abs=0.03), "python docs/internals/make_demo.py"


def test_readme_has_the_sentence_of_the_demo():
    assert DEMO["SENTENCE"].search((ROOT / "README.md").read_text())
