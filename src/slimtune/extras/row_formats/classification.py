"""Texts and conversations with their classes."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from ...core.data.messages import RowError
from ...core.data.rows import Fields, Record, RowFormat
from ...errors import format_names
from ..message_parsing import (
    INVISIBLE,
    get_json_type_name,
    is_blank,
    parse_list_or_json_array,
    parse_messages_and_train_mask,
    require_text,
)
from .chats import parse_tools


def _read_classification(record: Record) -> Fields:
    if ("text" in record) == ("messages" in record):
        raise RowError("has 'text' and 'messages'" if "text" in record else "has no 'text' or 'messages'", "bad-text")
    label = record["label"]
    if isinstance(label, str) and label.lstrip().startswith("["):
        label = parse_list_or_json_array(label, "label")  # as a CSV file has it
    labels = tuple(_parse_label(name) for name in (label if isinstance(label, list) else [label]))
    if len(set(labels)) < len(labels):
        raise RowError(f"names a label twice: {format_names(labels)}", "bad-label")
    fields: Fields = {"messages": [], "labels": labels}
    if "text" in record:
        return fields | {"prompt": require_text(record["text"], "'text'")}
    fields["messages"], _ = parse_messages_and_train_mask(record["messages"], require_trained_turn=False)
    if not fields["messages"]:
        raise RowError("'messages' is empty", "empty-content")
    return fields | {"tools": parse_tools(record.get("tools"))}


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Return the names of classes, each once, in the order of their ids: sorted, numbers by their value."""
    unique = set(names)
    numbers = all(name.isdecimal() for name in unique)
    return sorted(unique, key=lambda name: (int(name) if numbers else 0, name))


def normalize_label_case_and_unicode(name: str) -> str:
    """Return a label as a reader sees it: without case, invisible characters, and forms of letters (NFKC)."""
    visible = INVISIBLE.sub("", unicodedata.normalize("NFKC", name))
    return " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())


def describe_lookalike_label(name: str, known: Iterable[str]) -> str:
    """Return which known label looks like another one, both with escapes; empty: none does."""
    like = next(
        (
            other
            for other in known
            if other != name and normalize_label_case_and_unicode(other) == normalize_label_case_and_unicode(name)
        ),
        None,
    )
    return "" if like is None else f"{name!a} looks like {like!a}"


def _parse_label(value: Any) -> str:
    """Return the name of a class: a text, an integer or a boolean; raise RowError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as one of floats
    if isinstance(value, str) and not is_blank(value):
        return require_text(value, "'label'").strip()
    if isinstance(value, bool | int):
        return str(value)
    raise RowError(f"'label' is {format_cell_for_error(value)}: wanted the name or the number of a class", "bad-label")


def format_cell_for_error(value: Any) -> str:
    """Return a value as errors show it: its JSON type and its beginning."""
    return "empty" if value in (None, "", {}) else f"{get_json_type_name(value)}: {str(value)[:40]}"


CLASSIFICATION = RowFormat(
    ("label",), ("text", "messages", "tools"), _read_classification, one_of=("text", "messages"), by_name_only=True
)
