"""The README's picture shows the tutorial's terminal, and the tutorial prints what the commands print today."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first_adapter.md").read_text()


def test_picture_is_drawn_from_the_tutorial():
    picture = runpy.run_path(str(ROOT / "docs/internals/picture.py"))["make_picture"]()
    assert (ROOT / "docs" / "first_adapter.svg").read_text() == picture, "run python docs/internals/picture.py"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_tutorial_prints_what_the_command_prints(command):
    """Each line begins with words that the command's screen has, which tests/cli compares with the command."""
    (output,) = re.findall(rf"^```console\n\$ slimtune {command} (.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    screen = (ROOT / "tests" / "cli" / "screens" / f"{command}.txt").read_text()
    starts = [re.split(r"  +|[:,\d]| to runs| was ", line)[0] for line in output.splitlines()[1:]]
    assert [start for start in starts if start.strip("… ") and f"\n{start}" not in screen and start[:2] != "--"] == []
