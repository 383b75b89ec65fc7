"""What `slimtune explain` knows: one Markdown file for each known problem, and the search for the page of a text.

The name of a file is the page's code. Its front matter has a title, patterns that the texts of errors contain, and
hints: patterns that other errors contain, too, which only order the pages. A pattern is plain text, in which `*` stands
for up to 300 characters. No pattern is a regular expression, so that a text of any size or content is searched in
linear time.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .guides import find_command_guides, find_glossary_definition

MOST_TEXT = 50_000
"""Characters of a text that are searched: the last ones, where a traceback says what went wrong."""
_GAP = 300
_LEAST_COVERAGE, _LEAST_SCORE, _LEAST_LEAD = 0.6, 15.0, 1.5
"""A page is an answer by its words if it has this share of a text's words (weighted by how rare they are), or if its
score is this high and this many times the next page's."""
_LEAST_NEAR = 8.0
"""A page with a lower score is not named as near: it shares a word or two by chance."""
_STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "do", "does", "for", "from", "has", "have", "how", "i",
    "if", "in", "is", "it", "its", "my", "no", "not", "of", "on", "or", "so", "than", "that", "the", "this", "to", "up",
    "was", "what", "when", "why", "with", "you", "your",
})  # fmt: skip
_QUOTES = str.maketrans("", "", "\"'`\\")


@dataclass(frozen=True)
class ErrorPage:
    """A page: its code, its title, texts that errors contain, and Markdown with cause, check, fix and source."""

    code: str
    title: str
    patterns: tuple[str, ...]
    hints: tuple[str, ...]
    body: str


@cache
def load_error_pages() -> dict[str, ErrorPage]:
    """Return all pages by code."""
    pages = {}
    for file in sorted(Path(__file__).parent.glob("*.md")):
        _, front, body = file.read_text(encoding="utf-8").split("---\n", 2)
        # Its YAML has one JSON text a line: the title and the patterns. A YAML parser takes 0.2 s for all pages.
        front, _, hints = front.partition("\nhints:")
        (title, *patterns), weak = _read_texts(front), _read_texts(hints)
        pages[file.stem] = ErrorPage(file.stem, title, tuple(patterns), tuple(weak), body.strip())
    return pages


def _read_texts(lines: str) -> list[str]:
    return [json.loads(line[line.index('"') :]) for line in lines.splitlines() if '"' in line]


def infer_error_code(text: str, default: str) -> str:
    """Return the code of the page whose patterns fit an error's text best; `default` if none fits."""
    scores = {page.code: _score_patterns(text, page.patterns) for page in load_error_pages().values()}
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] else default


def is_answered_and_list_nearest_pages(text: str, max_pages: int = 3) -> tuple[bool, list[ErrorPage]]:
    """Return whether a page answers a text (a code, a question, an error, a whole traceback), and the nearest pages."""
    pages = load_error_pages()
    if (code := text.strip().lower().replace(" ", "-")) in pages:
        return True, [pages[code]]
    if find_glossary_definition(text):
        return False, []
    words, coverage = _score_words(text)
    scores = {
        code: (_score_patterns(text, page.patterns), _score_patterns(text, page.hints), words[code])
        for code, page in pages.items()
    }
    ranked = sorted(pages, key=lambda code: scores[code], reverse=True)
    if scores[ranked[0]][0]:  # beside a page by its patterns, only pages of the same kind are near
        return True, [pages[code] for code in ranked[:max_pages] if any(scores[code][:2])]
    if find_command_guides(text):
        return False, []
    first, second = sorted(words.values(), reverse=True)[:2]
    found = coverage >= _LEAST_COVERAGE or (coverage > 0 and first >= _LEAST_SCORE and first >= _LEAST_LEAD * second)
    return found, [
        pages[code] for code in ranked[:max_pages] if found or any(scores[code][:2]) or words[code] >= _LEAST_NEAR
    ]


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


def _contains(text: str, pattern: str) -> bool:
    """Return whether the pieces of a pattern follow each other in a text; a short pattern must be whole words."""
    first, *rest = (" ".join(piece.split()) for piece in pattern.lower().translate(_QUOTES).split("*"))
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


def _split_words(text: str) -> list[str]:
    """Return the words that may say what a text is about, without a plural's s: no paths, numbers or addresses."""
    words = " ".join(w for w in text.lower().split() if w.count("/") + w.count("\\") < 2)
    found = (w.rstrip("s") for w in re.findall(r"[^\W\d_]+", words) if w not in _STOP_WORDS)
    return [w for w in found if len(w) > 1]


@cache
def _build_index() -> tuple[dict[str, set[str]], dict[str, set[str]], dict[str, Counter[str]], Counter[str]]:
    """Return each page's words in its title, those in its title and patterns, how often each word occurs in it; and in
    how many pages each word occurs."""
    titles, subjects, counts = {}, {}, {}
    for code, page in load_error_pages().items():
        titles[code] = set(_split_words(f"{code} {page.title}".replace("-", " ")))
        head = " ".join((page.title, *page.patterns, *page.hints))
        subjects[code] = titles[code] | {*_split_words(head)}
        counts[code] = Counter(_split_words(f"{head} {page.body}")) + Counter(titles[code])
    return titles, subjects, counts, Counter(word for words in counts.values() for word in words)


def _score_words(text: str) -> tuple[dict[str, float], float]:
    """Return every page's score for a text's words, and the share of the words that the best page has.

    The score is BM25 (k1 = 1.2, b = 0.75), and a word in a page's title counts once more. The share is 0 if the best
    page's title and patterns have none of the words: it mentions them, and is about something else.
    """
    titles, subjects, counts, frequency = _build_index()
    sizes = {code: words.total() for code, words in counts.items()}
    query, mean = set(_split_words(text[-MOST_TEXT:])), sum(sizes.values()) / len(sizes)
    rarity = {w: math.log(1 + (len(counts) - frequency[w] + 0.5) / (frequency[w] + 0.5)) for w in query}
    scores = {}
    for code, words in counts.items():
        share = 1.2 * (0.25 + 0.75 * sizes[code] / mean)
        scores[code] = sum(rarity[w] * (2.2 * words[w] / (words[w] + share) + (w in titles[code])) for w in query)
    best = max(scores, key=lambda code: scores[code])
    known = sum(rarity[w] for w in query if counts[best][w])
    return scores, known / sum(rarity.values()) if query & subjects[best] else 0.0
