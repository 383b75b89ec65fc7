"""Guessing which columns of a file have the roles of a format, by their names and their values: for hints alone.

No row is ever read by a guess. A hint writes it as flags, which can be pasted as they are.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.data.rows import Record
from .ratings import parse_rating_or_none

_ASKS = ("prompt", "instruction", "question", "query", "asks", "asked", "ask", "request", "problem", "user", "customer",
         "human", "input", "message", "subject", "frage")  # fmt: skip
_REPLIES = ("completion", "output", "response", "answer", "answers", "reply", "replies", "solution", "assistant",
            "agent", "bot", "we", "support", "result", "antwort")  # fmt: skip
ROLE_WORDS: dict[str, tuple[str, ...]] = {
    "prompt": _ASKS,
    "instruction": _ASKS,
    "completion": _REPLIES,
    "output": _REPLIES,
    "chosen": ("chosen", "preferred", "better", "best", "good", "accepted", "winner", "winning", "right", "correct"),
    "rejected": ("rejected", "dispreferred", "worse", "worst", "bad", "loser", "losing", "wrong", "incorrect"),
    "label": ("label", "labels", "class", "category", "rating", "thumbs", "thumb", "vote", "feedback", "topic",
              "intent", "sentiment", "kind", "type", "tag", "liked", "helpful", "good", "score", "target", "verdict"),
    "text": ("text", "mail", "email", "message", "body", "sentence", "review", "comment", "ticket", "content",
             "document", "tweet", "utterance", "query", "question", "description", "subject"),
}  # fmt: skip
"""Words in the names that people give to a column, by its role; the first fit best."""
HINTED_ROLES = {"preference": ("prompt", "chosen", "rejected"), "classification": ("text", "label")}
"""The roles that a hint names, where they are not those that the format requires."""
FORMATS_BY_NAME = ("preference", "unpaired-preference", "instruction")
"""The formats that columns of any names may be meant for, the one with the rarest words first."""
LIST_ROLES = ("messages", "conversations")
MOST_CLASSES = 20
LABEL_CHARACTERS = 40


def list_hinted_roles(format_name: str, required: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a format that a hint names."""
    return HINTED_ROLES.get(format_name, tuple(required))


def make_column_flags_and_doubt(format_name: str, roles: Sequence[str], records: Sequence[Record]) -> tuple[str, str]:
    """Return `--column` flags for the roles of a format, with the file's columns, and what is unsure about them.

    A role for which no column is left is written as `role=COLUMN`. Columns that have the role's name need no flag.
    """
    found, is_order_guessed = guess_columns_and_whether_by_order(
        roles, records, ratings=format_name == "unpaired-preference"
    )
    pairs = [f"{role}={found.get(role, 'COLUMN')}" for role in roles if found.get(role) != role]
    flags = " ".join(f"--column {shlex.quote(pair)}" for pair in pairs)
    unsure = "which answer is the better one is a guess" if is_order_guessed else ""
    return flags, unsure


def suggest_format_by_column_names(formats: Mapping[str, Sequence[str]], records: Sequence[Record]) -> str | None:
    """Return the format whose roles all stand in the names of the columns; `formats`: the roles of each."""
    columns = _list_values(records)
    for name in FORMATS_BY_NAME:
        if name in formats and len(_match_names(formats[name], columns, name == "unpaired-preference")) == len(
            formats[name]
        ):
            return name
    return None


def guess_columns_and_whether_by_order(
    roles: Sequence[str], records: Sequence[Record], *, ratings: bool = False
) -> tuple[dict[str, str], bool]:
    """Return the column of each role that can be guessed, and whether only the file's order tells chosen from rejected.

    Names decide first, then values: labels are few and short, texts are the longest columns that vary. With `ratings`
    labels are those of good and bad answers.
    """
    columns = _list_values(records)
    found = _match_names(roles, columns, ratings)
    left = {name: values for name, values in columns.items() if name not in found.values()}
    if "label" in roles and "label" not in found and (name := _find_label(left, ratings)) is not None:
        found["label"] = name
        del left[name]
    for role in LIST_ROLES:
        lists = [name for name, values in left.items() if _are_lists(values)]
        if role in roles and role not in found and lists:
            found[role] = lists[0]
    texts = [name for name, values in left.items() if _is_text(values)]
    missing = [role for role in roles if role not in found and role not in ("label", *LIST_ROLES)]
    by_length = sorted(texts, key=lambda name: -_mean_length(left[name]))[: len(missing)]
    chosen = [name for name in texts if name in by_length]  # in the order of the file: a question before its answer
    if missing == ["prompt", "completion"] or missing == ["instruction", "output"]:
        chosen.sort(key=lambda name: -_question_share(left[name]))
    is_order_guessed = {"chosen", "rejected"} <= set(missing[: len(chosen)])
    return found | dict(zip(missing, chosen, strict=False)), is_order_guessed


def _list_values(records: Sequence[Record]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [r[name] for r in records if r.get(name) not in (None, "", [], {})] for name in names}


def _match_names(roles: Sequence[str], columns: Mapping[str, list[Any]], ratings: bool) -> dict[str, str]:
    """Return the columns whose names have a word of a role; each column has one role, the best pair first.

    A column of labels is the last choice for a text: who answered, an "agent", is no answer.
    """
    scores: list[tuple[bool, bool, int, int, str, str]] = []
    for role in roles:
        fits: Callable[[list[Any]], bool] = _is_text
        if role == "rejected":  # one text may be the worse answer to every prompt
            fits = _has_letters
        if role == "label":
            fits = _are_ratings if ratings else _are_labels
        for name, values in columns.items():
            words = [name.strip().casefold(), *_split_words(name)]
            places = [ROLE_WORDS[role].index(word) for word in words if word in ROLE_WORDS.get(role, ())]
            if places and fits(values):
                is_whole, is_odd = words[0] in ROLE_WORDS[role], role != "label" and _are_labels(values)
                scores.append((is_odd, not is_whole, min(places), len(scores), role, name))
    found: dict[str, str] = {}
    for *_, role, name in sorted(scores):
        if role not in found and name not in found.values():
            found[role] = name
    return found


def _split_words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())


def _find_label(columns: Mapping[str, list[Any]], ratings: bool) -> str | None:
    """Return the column with the fewest values among those that look like labels."""
    fits = _are_ratings if ratings else _are_labels
    found = [name for name, values in columns.items() if fits(values) and len(set(map(str, values))) > 1]
    return min(found, key=lambda name: len(set(map(str, columns[name]))), default=None)


def _are_ratings(values: list[Any]) -> bool:
    return bool(values) and 2 * sum(parse_rating_or_none(value) is not None for value in values) >= len(values)


def _are_labels(values: list[Any]) -> bool:
    """Return whether values are few and short, and come again."""
    if not values or not all(isinstance(value, str | int) for value in values):
        return False
    distinct = len(set(map(str, values)))
    is_few = distinct <= MOST_CLASSES and (len(values) < 4 or 2 * distinct <= len(values) + 2)
    return is_few and max(len(str(value)) for value in values) <= LABEL_CHARACTERS


def _are_lists(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, list) or (isinstance(v, str) and v.lstrip()[:1] == "[") for v in values)


def _is_text(values: list[Any]) -> bool:
    """Return whether a column has texts: with letters, and not the same one in every row."""
    return _has_letters(values) and (len(values) == 1 or len(set(values)) > 1)


def _has_letters(values: list[Any]) -> bool:
    if not values or not all(isinstance(value, str) for value in values):
        return False
    return 2 * sum(any(c.isalpha() for c in value) for value in values) >= len(values)


def _mean_length(values: list[Any]) -> float:
    return sum(len(value) for value in values) / max(1, len(values))


def _question_share(values: list[Any]) -> float:
    return sum(value.rstrip().endswith("?") for value in values) / max(1, len(values))
