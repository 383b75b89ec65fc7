"""What `slimtune explain` knows: one Markdown file for each known problem, and the search for the page of a text.

The name of a file is the page's code. Its front matter has a title, patterns that the texts of errors contain, and
hints: patterns that other errors contain, too, which only order the pages. A pattern is plain text, in which `*` stands
for up to 300 characters. No pattern is a regular expression, so that a text of any size or content is searched in
linear time. A line of its fix that begins with quoted messages is a case: it is for texts that contain one of these.
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
_MOST_QUESTION = 600
"""Characters of a question or of a short error; a longer text is a log, which only patterns find."""
_GAP = 300
_LEAST_SURE, _LEAST_ALIKE = 0.99, 0.88
"""The confidence in the first answer, or its likeness to a wording, from which on it alone is given."""
_LEAST_PROBABLE, _LEAST_ADDED, _LEAST_SHARE = 0.5, 0.5, 0.4
"""The confidence in the first three answers from which on the first five are given; what patterns add to the score of a
page beside which another is not given alone, at least and as a share of what they add most."""
_LEAST_NEAR, _LEAST_RELATED = 0.85, 1.2
"""The scores from which on others are named: if none is given, and beside one."""
_MOST_PROBABLE, _MOST_NEAR = 5, 3
_PATTERN_WEIGHT, _MOST_PATTERN, _HINT_WEIGHT, _MOST_HINT = 1 / 40, 4.0, 1 / 80, 0.3
"""What a fitting pattern or hint adds to a page's score for each of its characters, and at most."""
_EXCEPTION = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Warning)\b\s*:")
_WARNINGS_PAGE = "harmless-warning"
"""The page of texts that stand in many logs beside the error that counts: any other page comes before it."""
_QUOTES = str.maketrans("", "", "\"'`\\")
_FIX = "## Fix\n"
_CASE = re.compile(r'(?:- )?((?:"[^"]+"(?:, or |, and |, | or | and )?)+)')
"""The messages at the beginning of a case."""


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
    scores = _score_pages(text)
    best = max(scores, key=lambda code: (code != _WARNINGS_PAGE and scores[code] > 0, scores[code]))
    return best if scores[best] else default


@dataclass(frozen=True)
class PageForText:
    """What a page says about one text."""

    cases: tuple[str, ...]
    """The cases of its fix that are about the text."""
    body: str
    """The page with these cases first in its fix and without the others; all of it if none is about the text."""
    number_left_out: int
    """How many cases are not in the body."""


def select_cases(page: ErrorPage, text: str) -> PageForText:
    """Select the cases of a page's fix whose message is part of a text."""
    before, heading, fix = page.body.partition(_FIX)
    fix, source_heading, source = fix.partition("\n## ")
    parts, is_code = [""], False
    for line in fix.splitlines(keepends=True):
        if not is_code and line.strip() and not line.startswith("```"):
            parts.append(line)
        else:  # a command belongs to the line before it
            parts[-1] += line
        is_code ^= line.startswith("```")
    messages = {part: re.findall('"([^"]+)"', found[1]) for part in parts if (found := _CASE.match(part))}
    every, _ = _normalize(text)
    cases = [
        part.removeprefix("- ").strip()
        for part in messages if any(_contains(every, m.replace("…", "*")) for m in messages[part])
    ]  # fmt: skip
    if not cases:
        return PageForText((), page.body, 0)
    others = "".join(part for part in parts if part not in messages).strip()
    fix = "\n\n".join([*cases, others]).strip()
    body = f"{before}{heading}{fix}\n{source_heading}{source}"
    return PageForText(tuple(cases), body, len(messages) - len(cases))


@dataclass(frozen=True)
class FoundAnswers:
    """What answers a text."""

    sure: ErrorPage | QuestionGuide | None
    """The answer; None if it is not sure which one is."""
    probable: tuple[ErrorPage | QuestionGuide, ...]
    """Up to five answers of which one is probably meant, the nearest first; empty if one is sure, or none is near."""
    near: tuple[ErrorPage | QuestionGuide, ...]
    """Others that may be meant, the nearest first."""


def find_answers(text: str) -> FoundAnswers:
    """Find what answers a text: a code, a heading of the docs, a question, an error, or a whole traceback."""
    pages = load_error_pages()
    if (code := text.strip().lower().replace(" ", "-")) in pages:
        return FoundAnswers(pages[code], (), ())
    if len(text) <= _MOST_QUESTION and (headed := find_section_by_exact_heading(text)):
        return FoundAnswers(headed, (), ())
    ranked = rank_answers(text)
    if ranked is None:
        return FoundAnswers(None, (), ())
    names, added = list(ranked.scores), ranked.added
    least_fit = max(_LEAST_ADDED, _LEAST_SHARE * max(added.values()))
    fitting = [code for code in added if added[code] >= least_fit]
    is_alone = fitting in ([], names[:1])
    is_log = len(text) > _MOST_QUESTION and bool(fitting)
    if ranked.nearest >= _LEAST_ALIKE or (is_alone and (is_log or ranked.confidence >= _LEAST_SURE)):
        sure, probable, rest = names[:1], [], names[1:]
    elif fitting or ranked.confidence_of_three >= _LEAST_PROBABLE:
        sure, probable, rest = [], names[:_MOST_PROBABLE], names[_MOST_PROBABLE:]
    else:
        sure, probable, rest = [], [], names
    least = _LEAST_RELATED if sure or probable else _LEAST_NEAR
    near = [name for name in rest if added.get(name, 0) > 0 or ranked.scores[name] >= least]
    near.sort(key=lambda name: added.get(name, 0) <= 0)
    return FoundAnswers(
        _get_answers(sure)[0] if sure else None, _get_answers(probable), _get_answers(near[:_MOST_NEAR])
    )


def rank_answers(text: str) -> RankedAnswers | None:
    """Rank all answers by how near a text is to their wordings and patterns; None if it is near none."""
    patterns = _score_pages(text)
    added = {
        code: min(patterns[code] * _PATTERN_WEIGHT, _MOST_PATTERN)
        + min(_score_patterns(text, page.hints) * _HINT_WEIGHT, _MOST_HINT)
        for code, page in load_error_pages().items()
    }
    if any(score for code, score in patterns.items() if code != _WARNINGS_PAGE):
        added[_WARNINGS_PAGE] = -_MOST_PATTERN
    return _build_index().rank(text if len(text) <= _MOST_QUESTION else "", added)


def _get_answers(names: list[str]) -> tuple[ErrorPage | QuestionGuide, ...]:
    pages, sections = load_error_pages(), load_docs_sections_by_heading()
    return tuple(pages[name] if name in pages else sections[name].guide for name in names)


@cache
def _build_index() -> WordingIndex:
    pages, sections = load_error_pages(), load_docs_sections_by_heading()
    wordings = {code: (page.title, code.replace("-", " "), *page.asked) for code, page in pages.items()}
    definitions = {term.guide.name for term in load_terms().values()}
    return WordingIndex(wordings | {name: section.wordings for name, section in sections.items()}, definitions)


def _score_pages(text: str) -> dict[str, float]:
    """Return how well each page's patterns fit a text. One within a longer one that fits, too, says nothing more."""
    every, _ = _normalize(text)
    fitting = {code: [p for p in page.patterns if _contains(every, p)] for code, page in load_error_pages().items()}
    longer = [p.lower() for patterns in fitting.values() for p in patterns]
    return {
        code: _score_patterns(text, [p for p in patterns if not any(p.lower() in q != p.lower() for q in longer)])
        for code, patterns in fitting.items()
    }


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
