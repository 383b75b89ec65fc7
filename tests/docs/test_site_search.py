"""The site's search shows sections with every word of a question; the separator in zensical.toml drops small words."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEPARATOR = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["plugins"]["search"]["separator"]


def split_words(text: str) -> list[str]:
    return [word.lower() for word in re.split(SEPARATOR, text) if word]


@pytest.mark.parametrize(
    ("question", "page", "heading"),
    [
        ("which model should I use", "quick_answers", "Which model should I use as the base?"),
        ("how many examples do I need", "quick_answers", "How many rows do I need?"),
        ("How long does training take?", "quick_answers", "How long does training take?"),
        ("excel csv umlauts wrong", "quick_answers", "My rows are in Excel. What now?"),
        ("ollama gibberish", "quick_answers", "My Ollama model answers nonsense. Why?"),
        ("what is an epoch", "glossary", "Epoch"),
        ("What is the rank?", "glossary", "Rank"),
    ],
)
def test_section_has_the_words_of_its_question(question, page, heading):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    words = split_words(text[text.index(f"### {heading}\n") :].split("\n### ")[0])
    missing = [asked for asked in split_words(question) if not any(word.startswith(asked) for word in words)]
    assert (missing, split_words(question) != []) == ([], True)
