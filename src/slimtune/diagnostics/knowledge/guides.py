"""Answers to questions that are no errors: a command, a text of Quick answers, or a definition from the glossary."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MOST_QUESTION = 200
"""Characters of a question that is no error."""
COMMANDS = (
    (("buy", "rent", "laptop", "mac", "macbook", "which gpu", "what gpu", "which card", "graphics card",
      "which machine", "which computer"),
     "slimtune choose MODEL", "ranks the machines that train it, to buy and to rent"),
    (("fit on", "enough memory", "enough vram", "how long does", "how long will", "how much memory", "how much vram"),
     "slimtune plan MODEL --gpu NAME", "says whether a run fits, and how long it takes"),
    (("cost", "costs", "price", "cheap", "cheaper", "cheapest", "expensive", "dollars"),
     "slimtune cost MODEL --gpu NAME", "compares buying, renting and services"),
)  # fmt: skip
"""Words of a question, the command that answers it, and what the command does."""
QUICK_ANSWERS = (
    (("how many rows", "how many examples", "how much data", "how many samples", "how many conversations"),
     "How many rows do I need?"),
    (("which rank", "what rank", "best rank", "good rank"), "Which rank?"),
    (("which learning rate", "what learning rate", "best learning rate", "good learning rate"), "Which learning rate?"),
    (("how many epochs",), "How many epochs?"),
    (("which method", "what method", "best method"), "Which method?"),
    (("which base", "what base", "which model", "what model", "best model"), "Which model should I use as the base?"),
    (("what batch size", "which batch size"), "Which batch size?"),
    (("lora or qlora", "lora and qlora", "lora vs qlora"), "LoRA or QLoRA?"),
)  # fmt: skip
"""Words of a question, and the question of docs/quick_answers.md whose text answers it."""
_DEFINITION = re.compile(
    r"(?:what (?:is|are|s)|define|meaning of) (?:an? |the )?(.+)|what do(?:es)? (?:an? |the )?(.+) mean"
)
_TRAILING_LINKS = re.compile(r"(?: (?:See |· )?\[[^\]]*\]\([^)]*\)\.?)+$")


@dataclass(frozen=True)
class QuestionGuide:
    """What answers a question that is no error."""

    answer: str
    """A command, a question of Quick answers, or a word of the glossary."""
    what: str
    """What the command does, or the text of the answer or definition."""


def find_command_guides(question: str) -> list[QuestionGuide]:
    """Return the commands and texts that answer a short question about no error, each with what it does or says."""
    if len(question) > MOST_QUESTION:
        return []
    words = f" {' '.join(re.findall(r'[a-z0-9-]+', question.lower()))} "
    quick = _load_sections("quick_answers.md")
    return (
        [QuestionGuide(answer, what) for asked, answer, what in COMMANDS if any(f" {part} " in words for part in asked)]
        + [
            QuestionGuide(title, quick[title])
            for asked, title in QUICK_ANSWERS
            if any(f" {part} " in words for part in asked)
        ]
        or find_glossary_definition(question)
        or [guide for guide in [_load_terms().get(_normalize(question))] if guide]
    )


def find_glossary_definition(question: str) -> list[QuestionGuide]:
    """Return the word of the glossary that a question asks the meaning of, with its definition; nothing if none."""
    asked = _DEFINITION.fullmatch(" ".join(re.findall(r"[a-z0-9]+", question[: MOST_QUESTION + 1].lower())))
    found = _load_terms().get(_normalize(asked[1] or asked[2])) if asked else None
    return [found] if found else []


@cache
def _load_terms() -> dict[str, QuestionGuide]:
    return {_normalize(term): QuestionGuide(term, text) for term, text in _load_sections("glossary.md").items()}


def _normalize(term: str) -> str:
    """Return a term in lower case, without signs and without the s of plurals."""
    return " ".join(word.rstrip("s") for word in re.findall(r"[a-z0-9]+", term.lower()))


@cache
def _load_sections(name: str) -> dict[str, str]:
    """Return the texts under the headings of a page of the docs, without its links."""
    here = Path(__file__).parent
    # A wheel has these pages beside the code (see pyproject.toml), a checkout in docs/.
    file = next(file for file in (here / "docs" / name, here.parents[3] / "docs" / name) if file.is_file())
    sections = {}
    for section in re.split(r"^### ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        text = _TRAILING_LINKS.sub("", " ".join(body.partition("\n## ")[0].split()))
        sections[title] = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return sections
