"""What `slimtune explain` knows: one Markdown file for each known problem, and the search for the page of a text.

The name of a file is the page's code. Its front matter has a title, and patterns that real error texts contain: plain
text, in which `*` stands for up to 300 characters. No pattern is a regular expression, so that a text of any size or
content is searched in linear time.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MOST_TEXT = 50_000
"""Characters of a text that are searched: the last ones, where a traceback says what went wrong."""
_GAP = 300
_LEAST_COVERAGE = 0.6
"""Share of a question's words, weighted by how rare they are, that the page of an answer must have."""
_STOP_WORDS = frozenset("a an and are as at be but by do does for from has have how i if in is it its my no not of on or"
                        " so than that the this to up was what when why with you your".split())  # fmt: skip


@dataclass(frozen=True)
class Page:
    """A page: its code, its title, texts that errors contain, and Markdown with cause, check, fix and source."""

    code: str
    title: str
    patterns: tuple[str, ...]
    body: str


@cache
def load_pages() -> dict[str, Page]:
    """Return all pages by code."""
    pages = {}
    for file in sorted(Path(__file__).parent.glob("*.md")):
        _, front, body = file.read_text(encoding="utf-8").split("---\n", 2)
        # Its YAML has one JSON text a line: the title, and the patterns. A YAML parser takes 0.2 s for all pages.
        title, *patterns = (json.loads(line[line.index('"') :]) for line in front.splitlines() if '"' in line)
        pages[file.stem] = Page(file.stem, title, tuple(patterns), body.strip())
    return pages


def find_code(text: str, default: str) -> str:
    """Return the code of the page whose patterns fit an error's text best; `default` if none fits."""
    scores = _score_patterns(text)
    return max(scores, key=lambda code: scores[code]) if scores else default


def search_pages(text: str, most: int = 3) -> tuple[bool, list[Page]]:
    """Return whether a page answers a text (a code, a question, an error, a whole traceback), and the nearest pages."""
    pages = load_pages()
    if (code := text.strip().lower().replace(" ", "-")) in pages:
        return True, [pages[code]]
    by_pattern, (by_words, coverage) = _score_patterns(text), _score_words(text)
    ranked = sorted(pages, key=lambda code: (by_pattern.get(code, 0), by_words[code]), reverse=True)
    found = bool(by_pattern) or coverage >= _LEAST_COVERAGE
    return found, [pages[code] for code in ranked[:most] if by_pattern.get(code) or by_words[code]]


def _score_patterns(text: str) -> dict[str, float]:
    """Return the pages with patterns in a text, scored by the longest: a long one says more. The last line counts most."""
    text = text[-MOST_TEXT:].strip().lower()
    every, last = " ".join(text.split()), " ".join(text.rpartition("\n")[2].split())
    scores = {}
    for page in load_pages().values():
        sizes = [len(p) * (1.5 if _contains(last, p) else 1) for p in page.patterns if _contains(every, p)]
        if sizes:
            scores[page.code] = max(sizes) + 0.1 * sum(sizes)
    return scores


def _contains(text: str, pattern: str) -> bool:
    """Return whether the pieces of a pattern follow each other in a text; a short pattern must be whole words."""
    first, *rest = (piece.strip() for piece in pattern.lower().split("*"))
    start = text.find(first)
    while start >= 0:
        end = start + len(first)
        is_word = len(pattern) >= 8 or not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())
        for piece in rest:
            found = text.find(piece, end, end + _GAP + len(piece)) if end >= 0 else -1
            end = found + len(piece) if found >= 0 else -1
        if is_word and end >= 0:
            return True
        start = text.find(first, start + 1)
    return False


def _split_words(text: str) -> list[str]:
    return [w for w in re.findall(r"[^\W_]+", text.lower()) if len(w) > 1 and w not in _STOP_WORDS]


def _score_words(text: str) -> tuple[dict[str, float], float]:
    """Return every page's BM25 score for a text's words, and the share of the words that the best page has."""
    pages = load_pages().values()
    counts = {p.code: Counter(_split_words(f"{f'{p.code} {p.title} ' * 3}{' '.join(p.patterns)} {p.body}")) for p in pages}
    sizes = {code: sum(words.values()) for code, words in counts.items()}
    frequency = Counter(word for words in counts.values() for word in words)
    query = set(_split_words(text[-MOST_TEXT:]))
    rarity = {w: math.log(1 + (len(counts) - frequency[w] + 0.5) / (frequency[w] + 0.5)) for w in query}
    mean = sum(sizes.values()) / len(sizes)
    scores = {
        code: sum(rarity[w] * 2.2 * words[w] / (words[w] + 1.2 * (0.25 + 0.75 * sizes[code] / mean)) for w in query)
        for code, words in counts.items()
    }
    best = max(scores, key=lambda code: scores[code])
    known = sum(rarity[w] for w in query if counts[best][w])
    return scores, known / sum(rarity.values()) if query else 0.0
