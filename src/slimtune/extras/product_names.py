"""Names of models and GPUs as people spell them: families and sizes are compared, not letters.

`llama3.1:8b`, `Llama 3.1 8B` and `llama-3.1-8b` have the tokens llama, 3.1, 8, b. By letters alone `gpt2` is near to
`gpt-oss-20b` and `rtx-5090` to `rtx-5060`, but they are other products.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

VENDOR_WORDS = {"nvidia", "geforce", "amd", "radeon", "instinct", "intel", "apple", "tesla"}
LIKE = 0.75
"""Similarity of two words from which one is a typing error of the other."""


def tokenize_product_name(name: str) -> tuple[str, ...]:
    """Return the words and numbers of a name, in lower case."""
    return tuple(re.findall(r"[a-z]+|\d+(?:\.\d+)?", name.lower()))


def suggest_name_with_same_numbers(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest name with the same numbers and almost the same words, or `""`.

    A known name may go on with more words and numbers: `m2` is near to `m2-pro-16gb`, `codestral` to `devstral-24b`.
    """
    words, numbers = _split(name)

    def matches(other: str) -> bool:
        other_words, other_numbers = _split(other)
        if other_numbers[: len(numbers)] != numbers or len(words) > len(other_words):
            return False
        return all(map(_alike, words, other_words))

    def similarity(other: str) -> float:
        return SequenceMatcher(None, name.lower(), other.lower()).ratio()

    close = max(filter(matches, known), key=similarity, default=None) if words or numbers else None
    return f"; did you mean {close!r}?" if close is not None else ""


def list_same_family_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that begin with the same word, such as every Gemma for `gemma-3-27b`."""
    first = tokenize_product_name(name)[:1]
    return [other for other in known if first and _alike(first[0], tokenize_product_name(other)[0])]


def _split(name: str) -> tuple[list[str], list[str]]:
    tokens = [t for t in tokenize_product_name(name) if t not in VENDOR_WORDS]
    return [t for t in tokens if not t[0].isdigit()], [t for t in tokens if t[0].isdigit()]


def _alike(word: str, other: str) -> bool:
    return word == other or (min(len(word), len(other)) > 2 and SequenceMatcher(None, word, other).ratio() >= LIKE)
