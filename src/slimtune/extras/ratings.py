"""Ratings of answers, thumbs up and thumbs down, in the words that files have for them."""

import re
import unicodedata
from typing import Any

from ..errors import suggest

RATINGS = {
    **dict.fromkeys(("true", "yes", "good", "up", "thumbs up", "1", "👍"), True),
    **dict.fromkeys(("false", "no", "bad", "down", "thumbs down", "0", "👎"), False),
}
"""Each word for a rating, and whether it is that of a good answer; case, spaces and skin colors do not count."""
RATING_HINT = (
    "a good answer is rated true, yes, good, up, 1 or 👍, a bad one false, no, bad, down, 0 or 👎: write the labels so"
)
_MARKS = re.compile("[\u200b-\u200f\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
"""Characters that change only how a sign looks: variation selectors, joiners and skin colors."""


def parse_rating_or_none(value: Any) -> bool | None:
    """Return whether a label says that an answer is good; None: it says neither."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None  # a column of integers with gaps is read as one of floats
    return RATINGS.get(_normalize(value)) if isinstance(value, str) else None


def suggest_rating(value: Any) -> str:
    """Return the rating that is nearest to a wrong one, as an addition to a message; empty: none is near."""
    return suggest(_normalize(value), RATINGS) if isinstance(value, str) else ""


def _normalize(text: str) -> str:
    text = _MARKS.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(re.sub(r"[_-]", " ", text).split())
