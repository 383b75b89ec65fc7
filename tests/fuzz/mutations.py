"""Random damage to bytes, text and JSON, and values that no program expects."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

DEEP = "[" * 3000 + "]" * 3000
HUGE_INT = 10**5000
NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**7, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, float("inf"), float("nan"), "", " ",
    "x" * 70_000, "../../etc/passwd", "/dev/null", "\x1b]0;title\x07\x1b[2J", "\x00", "\ud800", "[bold]x[/]",
    "[INST] x", "(.*)*!", "(([a-z0-9_.])+)+!", "*.q_proj", "(", "[q_proj", ".*", "__class__", "{{ 7*7 }}", "${HOME}",
    "%s%s%n", "NaN", "1e5", "2024-13-45", [], {}, [[]], [None], {"": ""}, [{}], {"a": {"a": {"a": 1}}},
    ["q_proj", "q_proj"],
    [1, "1"],
)  # fmt: skip
"""Replacements for any value of JSON or YAML."""


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with one place changed: replaced, removed, moved, nested, or under a wrong key."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            places.append((node, key))
            collect(child)

    collect(value)
    if not places:
        return rng.choice(NASTY_VALUES)
    node, key = rng.choice(places)
    change = rng.randrange(7)
    if change <= 2:
        node[key] = rng.choice(NASTY_VALUES)
    elif change == 3:
        del node[key]
    elif change == 4 and isinstance(node, dict):
        node[rng.choice([f"{key}s", str(key).upper(), f" {key}", "label", "images", "extra"])] = node[key]
    elif change == 5:
        node[key] = [node[key]] * rng.choice([1, 2, 100])
    elif isinstance(node[key], str):
        node[key] = mutate_text(rng, node[key])
    elif isinstance(node[key], int | float):
        node[key] = rng.choice([-node[key], node[key] * 1000, str(node[key]), bool(node[key]), HUGE_INT])
    return value


def dump_json(rng: random.Random, value: Any) -> str:
    """Return JSON text; sometimes with a key given twice, or nested too deep."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.03:
        text = text.replace("{", '{"extra": ' + DEEP + ", ", 1)
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(NASTY_VALUES))}}}"
    return text


def mutate_text(rng: random.Random, text: str) -> str:
    """Return a text with one place changed."""
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice([1, 2, 8, 40]))
    changes: tuple[Callable[[], str], ...] = (
        lambda: text[:at] + text[end:],
        lambda: text[:at] + text[at:end] * rng.choice([2, 3, 50]) + text[end:],
        lambda: text[:at] + rng.choice("\x00\x1b\x07\u202e\ufeff\u2028\r\n\t{}[]\"'\\%#é") + text[at:],
        lambda: text[:at],
        lambda: text[:at] + str(rng.choice([s for s in NASTY_VALUES if isinstance(s, str)])) + text[end:],
        lambda: text[end:] + text[:at],
    )
    return rng.choice(changes)()


def mutate_bytes(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Return bytes with one place between `first` and `last` changed: bits, numbers, cuts, insertions."""
    last = len(data) if last is None else min(last, len(data))
    at = rng.randrange(first, max(first + 1, last))
    change = rng.randrange(5)
    if change == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if change == 1:
        return data[:at]
    if change == 2:
        number = struct.pack("<q", rng.choice([0, -1, 1, 2**31 - 1, 2**40, 2**62]))
        return data[:at] + number + data[at + 8 :]
    if change == 3:
        return data[:at] + rng.randbytes(rng.choice([1, 4, 64])) + data[at:]
    return data[:at] + rng.randbytes(4) + data[at + 4 :]
