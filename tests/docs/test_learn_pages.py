"""The Python of docs/learn prints what the page says, and every row of the starters can be read.

`python tests/docs/test_learn_pages.py` writes what the blocks print into the pages.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

from slimtune.extras.row_files import open_rows

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page for page in (DOCS / "learn").glob("*.md") if "```python" in page.read_text())
BLOCK = re.compile(r"```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FAST = {"ia3", "is_it_better", "lora", "merging_and_serving"}


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.random.fork_rng(devices=[]):
        exec(code, {})
    return out.getvalue()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[] if p.stem in FAST else pytest.mark.slow) for p in PAGES]
)
def test_the_code_prints_what_the_page_says(page):
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) == page.read_text().count("```python")
    for code, said in blocks:
        text = printed(code)
        assert NUMBER.sub("#", text) == NUMBER.sub("#", said)
        assert numbers(text) == pytest.approx(numbers(said), rel=0.05, abs=0.05)  # other processors round otherwise


def test_the_starters_rows_can_be_read(tmp_path):
    for number, block in enumerate(re.findall(r"```jsonl\n(.*?)```", (DOCS / "starters.md").read_text(), re.DOTALL)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(block)
        assert len(list(open_rows(file))) == len([json.loads(line) for line in block.splitlines()]) >= 3


def test_the_glossary_is_sorted_and_long_enough():
    terms = re.findall(r"^### (.+)$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) >= 60
    assert terms == sorted(terms, key=lambda term: re.sub(r"\W", "", term).casefold())


if __name__ == "__main__":
    for path in PAGES:
        text = path.read_text()
        path.write_text(BLOCK.sub(lambda m: m[0][: m.start(2) - m.start()] + printed(m[1]) + "```", text))
