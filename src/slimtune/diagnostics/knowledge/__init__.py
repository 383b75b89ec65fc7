"""What `slimtune explain` knows: one Markdown file for each known problem, and the search for the page of a text.

The name of a file is the page's code. Its front matter has a title, patterns that the texts of errors contain, and
hints: patterns that other errors contain, too, which only order the pages. A pattern is plain text, in which `*` stands
for up to 300 characters. No pattern is a regular expression, so that a text of any size or content is searched in
linear time.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .guides import QuestionGuide, find_section_by_exact_heading, load_docs_sections_by_heading, load_terms
from .question_words import RankedAnswers, WordingIndex

MOST_TEXT = 50_000
"""Characters of a text that are searched: the last ones, where a traceback says what went wrong."""
_MOST_QUESTION = 300
"""Characters of a question; a longer text is a log, which only patterns find."""
_GAP = 300
_LEAST_CONFIDENCE, _SURE, _LEAST_NEAR, _LEAST_RELATED = 0.95, 0.88, 0.85, 1.2
"""The confidence from which on an answer is given; the likeness to a wording from which on it is given in any case; the
scores from which on another is named: where nothing is surely meant, and beside an answer or an exception."""
_PROBABLE = 0.8
"""The confidence that one of the first three is right, from which on the first is given and the others are named."""
_EXCEPTION = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Warning)\b\s*:")
_WARNINGS_PAGE = "harmless-warning"
"""The page of texts that stand in many logs beside the error that counts: any other page comes before it."""
_QUOTES = str.maketrans("", "", "\"'`\\")


@dataclass(frozen=True)
class ErrorPage:
    """A page: its code, its title, texts that errors contain, and Markdown with cause, check, fix and source."""

    code: str
    title: str
    patterns: tuple[str, ...]
    hints: tuple[str, ...]
    asked: tuple[str, ...]
    body: str

    @property
    def name(self) -> str:
        """What `slimtune explain` finds it by."""
        return self.code


@cache
def load_error_pages() -> dict[str, ErrorPage]:
    """Return all pages by code."""
    pages = {}
    for file in sorted(Path(__file__).parent.glob("*.md")):
        _, front, body = file.read_text(encoding="utf-8").split("---\n", 2)
        # Its YAML has one JSON text a line: the title and the patterns. A YAML parser takes 0.2 s for all pages.
        front, _, asked = front.partition("\nasked:")
        front, _, hints = front.partition("\nhints:")
        title, *patterns = _read_texts(front)
        pages[file.stem] = ErrorPage(
            file.stem, title, tuple(patterns), tuple(_read_texts(hints)), tuple(_read_texts(asked)), body.strip()
        )
    return pages


def _read_texts(lines: str) -> list[str]:
    return [json.loads(line[line.index('"') :]) for line in lines.splitlines() if '"' in line]


def infer_error_code(text: str, default: str) -> str:
    """Return the code of the page whose patterns fit an error's text best; `default` if none fits."""
    scores = {page.code: _score_patterns(text, page.patterns) for page in load_error_pages().values()}
    best = max(scores, key=lambda code: (code != _WARNINGS_PAGE and scores[code] > 0, scores[code]))
    return best if scores[best] else default


@dataclass(frozen=True)
class AnswerAndNearPages:
    """What answers a text, if anything does, and what may be meant beside it."""

    found: ErrorPage | QuestionGuide | None
    """The answer; None if nothing is surely about the text."""
    alternatives: tuple[ErrorPage | QuestionGuide, ...]
    """What may be meant in place of `found`, the nearest first; empty: `found` surely is, or nothing was found."""
    near: tuple[ErrorPage | QuestionGuide, ...]
    """Related answers, the nearest first; if none was found, those that are perhaps meant."""


def find_answers(text: str, max_near: int = 3) -> AnswerAndNearPages:
    """Find what answers a text: a code, a heading of the docs, a question, an error, or a whole traceback."""
    pages = load_error_pages()
    if (code := text.strip().lower().replace(" ", "-")) in pages:
        return AnswerAndNearPages(pages[code], (), ())
    is_question = len(text) <= _MOST_QUESTION
    if is_question and (headed := find_section_by_exact_heading(text)):
        return AnswerAndNearPages(headed, (), ())
    ranked = rank_answers(text) if is_question else None
    scores = ranked.scores if ranked else {}
    fits = {
        code: (_score_patterns(text, page.patterns), _score_patterns(text, page.hints)) for code, page in pages.items()
    }
    by_pattern = sorted(
        (code for code in fits if any(fits[code])),
        key=lambda code: (code != _WARNINGS_PAGE and fits[code][0] > 0, fits[code]),
        reverse=True,
    )
    first, rivals, has_exception = "", list[str](), _EXCEPTION.search(text) is not None
    if ranked and ranked.nearest >= _SURE:
        first = next(iter(scores))
    elif by_pattern and fits[by_pattern[0]][0]:
        first = by_pattern[0]
    elif ranked and (next(iter(scores)) in pages or not has_exception):
        if ranked.confidence >= _LEAST_CONFIDENCE:
            first = next(iter(scores))
        elif ranked.confidence_of_first >= _PROBABLE:
            first, *rivals = list(scores)[:max_near]
    least = _LEAST_RELATED if first or has_exception else _LEAST_NEAR
    others = [*by_pattern, *(name for name, score in scores.items() if score >= least)]
    near = list(dict.fromkeys(name for name in others if name not in (first, *rivals)))[:max_near]
    return AnswerAndNearPages(_get_answers([first])[0] if first else None, _get_answers(rivals), _get_answers(near))


def rank_answers(question: str) -> RankedAnswers | None:
    """Rank all answers by how near a question is to their wordings; None if it shares no word with any."""
    return _build_index().rank(question, _are_linked)


def _are_linked(first: str, second: str) -> bool:
    """Return whether one of two answers leads to the other: its text names the other's code or heading."""
    texts = _load_texts()
    return first in texts[second] or second in texts[first]


def _get_answers(names: list[str]) -> tuple[ErrorPage | QuestionGuide, ...]:
    pages, sections = load_error_pages(), load_docs_sections_by_heading()
    return tuple(pages[name] if name in pages else sections[name].guide for name in names)


@cache
def _build_index() -> WordingIndex:
    pages, sections = load_error_pages(), load_docs_sections_by_heading()
    wordings = {code: (page.title, code.replace("-", " "), *page.asked) for code, page in pages.items()}
    definitions = {term.guide.name for term in load_terms().values()}
    return WordingIndex(wordings | {name: section.wordings for name, section in sections.items()}, definitions)


@cache
def _load_texts() -> dict[str, str]:
    """Return what each answer says, by its code or heading."""
    sections = load_docs_sections_by_heading()
    texts = {code: page.body for code, page in load_error_pages().items()}
    return texts | {name: section.guide.what for name, section in sections.items()}


def _score_patterns(text: str, patterns: Sequence[str]) -> float:
    """Return how well patterns fit a text: a long one says more than a short one, one in the last line most."""
    every, last = _normalize(text)
    sizes = [len(p) * (2.5 if _contains(last, p) else 1) for p in patterns if _contains(every, p)]
    return max(sizes, default=0) + 0.1 * sum(sizes)


@lru_cache(maxsize=2)
def _normalize(text: str) -> tuple[str, str]:
    """Return a text and its last line, as they are compared with patterns: in lower case, without quotes."""
    text = text[-MOST_TEXT:].strip().lower().translate(_QUOTES)
    return " ".join(text.split()), " ".join(text.rpartition("\n")[2].split())


@cache
def _split_pattern(pattern: str) -> tuple[str, ...]:
    return tuple(" ".join(piece.split()) for piece in pattern.lower().translate(_QUOTES).split("*"))


def _contains(text: str, pattern: str) -> bool:
    """Return whether the pieces of a pattern follow each other in a text; a short pattern must be whole words."""
    first, *rest = _split_pattern(pattern)
    start = text.find(first)
    while start >= 0:
        end = start + len(first)
        is_word = len(pattern) >= 8 or not (text[max(start - 1, 0) : start].isalnum() or text[end : end + 1].isalnum())
        for piece in rest:
            found = text.find(piece, end, end + _GAP + len(piece)) if end >= 0 else -1
            end = found + len(piece) if found >= 0 else -1
        if is_word and end >= 0:
            return True
        start = text.find(first, start + 1)
    return False
