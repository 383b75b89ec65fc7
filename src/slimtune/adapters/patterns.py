"""Regular expressions of configs, matched against module names in a bounded number of steps.

A config can come from a stranger, and a pattern such as `(.*)*!` keeps Python's `re` busy for ever. So a pattern runs
in `re` only if its repeats allow few ways through a name. The others are matched by sets: each part of the pattern maps
the positions where it may start to those where it may end. A set is an integer whose bits are the positions.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, reduce
from re import _parser  # type: ignore[attr-defined]  # no public function returns a parsed pattern
from typing import Any, TypeVar

from ..errors import ConfigError

Value = TypeVar("Value")
MAX_LENGTH = 20_000
"""Most characters in a pattern."""
_MAX_PATHS = 10_000
_NAME_LENGTH = 64
_SIMPLER = "a simpler regular expression"
_STEPS_PER_NAME, _STEPS = 500, 300_000
_REPEATS, _ASSERTS = ("MAX_REPEAT", "MIN_REPEAT"), ("ASSERT", "ASSERT_NOT")
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_CLASSES = {
    name: re.compile(text)
    for name, text in {
        "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
        "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W", "AT_BEGINNING": r"^", "AT_BEGINNING_STRING": r"\A",
        "AT_END": r"$", "AT_END_STRING": r"\Z", "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
    }.items()
}  # fmt: skip


class Pattern:
    """A regular expression for module names.

    Raises:
        ConfigError: it is malformed, or takes too many steps.
    """

    def __init__(self, text: str) -> None:
        self.shown = f"{text[:100]!r}{'…' if len(text) > 100 else ''}"
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"{self.shown} has {len(text)} characters", f"at most {MAX_LENGTH} characters")
        try:
            self.compiled, self.parts = re.compile(text), _parser.parse(text)
            self.by_sets = _count_paths(self.parts) > _MAX_PATHS
            unsupported = self.by_sets and (self.compiled.flags & ~re.UNICODE or _has_unsupported_part(self.parts))
        except (re.error, OverflowError, RecursionError) as e:
            problem = str(e) if isinstance(e, re.error) else "it is nested too deeply or repeats too often"
            message = f"{self.shown} is not a regular expression: {problem}"
            word = "".join(re.findall(r"[A-Za-z_]\w*", text)[-1:])
            hint = f"'.*{word}' for every name that ends with {word}, or a list of names: [{word}]" if word else ""
            raise ConfigError(message, "a regular expression, where * repeats what stands before it", hint) from None
        if unsupported:
            message = f"{self.shown} combines many repeats with flags, back-references or atomic groups"
            raise ConfigError(message, _SIMPLER)
        self.names = self.steps = 0

    def matches(self, name: str, starts: Sequence[int] = (0,)) -> bool:
        """Return whether the pattern matches `name` to its end from one of the positions `starts`."""
        if not self.by_sets:
            return any(self.compiled.fullmatch(name, start) for start in starts)
        self.names += 1
        try:
            ends = _SetMatcher(self, name).run(self.parts, sum(1 << start for start in starts))
        except RecursionError:
            raise ConfigError(f"{self.shown} is nested too deeply", _SIMPLER) from None
        return bool(ends >> len(name) & 1)


class _SetMatcher:
    """Matches one name; the masks and ends of parts are computed once."""

    def __init__(self, pattern: Pattern, name: str) -> None:
        self.pattern, self.name = pattern, name
        self.masks: dict[int, int] = {}
        self.ends: dict[tuple[int, int], int] = {}

    def run(self, parts: Any, starts: int) -> int:
        """Return the set of positions where a sequence of parts that starts in `starts` may end."""
        pattern = self.pattern
        for part in parts:
            pattern.steps += 1
            if pattern.steps > _STEPS + pattern.names * _STEPS_PER_NAME:
                raise ConfigError(f"{pattern.shown} takes too many steps", _SIMPLER)
            kind, value = str(part[0]), part[1]
            if kind in _SINGLE:
                starts = (starts & self._mask(part)) << 1
            elif kind == "AT":
                starts &= self._mask(part)
            elif kind in _REPEATS and _get_single(value[2]):
                starts = self._repeat(value, starts)
            else:
                starts = self._union(part, starts)
            if not starts:
                break
        return starts

    def _union(self, part: Any, starts: int) -> int:
        """Return the ends of a part with parts inside; those of each start are computed once."""
        ends = 0
        while starts:
            start = (starts & -starts).bit_length() - 1
            starts &= starts - 1
            key = (id(part), start)
            if key not in self.ends:
                self.ends[key] = self._run_nested(str(part[0]), part[1], start)
            ends |= self.ends[key]
        return ends

    def _run_nested(self, kind: str, value: Any, start: int) -> int:
        here = 1 << start
        if kind == "SUBPATTERN":
            return self.run(value[3], here)
        if kind == "BRANCH":
            return reduce(operator.or_, (self.run(branch, here) for branch in value[1]))
        if kind in _REPEATS:
            return self._repeat(value, here)
        direction, inside = value  # a look-ahead or a look-behind
        if direction > 0:
            found = self.run(inside, here) != 0
        else:
            found = any(self.run(inside, 1 << s) >> start & 1 for s in range(start + 1))
        return here if found == (kind == "ASSERT") else 0

    def _repeat(self, value: Any, starts: int) -> int:
        low, high, body = value
        reached = starts
        for _ in range(min(low, len(self.name) + 1)):
            before, reached = reached, self.run(body, reached)
            if reached in (before, 0):
                break
        single = _get_single(body)
        if high == _parser.MAXREPEAT and single:
            # Adding the mask carries each start to the end of its run of matching characters.
            mask = self._mask(single)
            return (((reached & mask) + mask) ^ mask) | reached
        new, ends, count = reached, reached, low
        while new and count < high:
            new = self.run(body, new) & ~ends
            ends, count = ends | new, count + 1
        return ends

    def _mask(self, part: Any) -> int:
        """Return the positions of the name where a part without length, or of one character, matches."""
        if id(part) not in self.masks:
            kind, value = str(part[0]), part[1]
            if kind == "AT":
                at, places = _CLASSES[str(value)], range(len(self.name) + 1)
                fits = [bool(at.match(self.name, i)) for i in places]
            else:
                fits = [_fits(kind, value, c) for c in self.name]
            self.masks[id(part)] = sum(1 << i for i, fit in enumerate(fits) if fit)
        return self.masks[id(part)]


@cache
def get_pattern(text: str) -> Pattern:
    """Return the pattern for a text, made once."""
    return Pattern(text)


def check_pattern(field: str, text: str) -> None:
    """Raise ConfigError if the pattern in a config's field is malformed."""
    try:
        get_pattern(text)
    except ConfigError as e:
        raise ConfigError(f"{field}: {e.message}", e.expected, e.hint) from None


def find_pattern(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that matches `name` or its end after a dot, or None."""
    starts = (0, *(i + 1 for i, c in enumerate(name) if c == "."))
    return next((p for p in patterns if get_pattern(p).matches(name, starts)), None)


def get_pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of the first pattern that matches `name` (see `find_pattern`), or the default."""
    key = find_pattern(patterns, name)
    return default if key is None else patterns[key]


def _fits(kind: str, value: Any, character: str) -> bool:
    """Return whether a part of one character matches it."""
    if kind == "IN":
        items = [(str(k), v) for k, v in value]
        return any(_fits(k, v, character) for k, v in items if k != "NEGATE") != (items[0][0] == "NEGATE")
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    if kind == "CATEGORY":
        return bool(_CLASSES[str(value)].match(character))
    return character != "\n" if kind == "ANY" else (ord(character) == value) == (kind == "LITERAL")


def _get_single(body: Any) -> Any:
    """Return the part of one character that a sequence consists of, in groups or not; None: it has other parts."""
    while len(body) == 1 and str(body[0][0]) == "SUBPATTERN":
        body = body[0][1][3]
    return body[0] if len(body) == 1 and str(body[0][0]) in _SINGLE else None


def _count_paths(parts: Any) -> float:
    """Return about how many ways `re` may try through a name, at worst."""
    paths = 1.0
    for part in parts:
        kind, value = str(part[0]), part[1]
        if kind in (*_REPEATS, "POSSESSIVE_REPEAT"):
            low, high, body = int(value[0]), min(int(value[1]), _NAME_LENGTH), value[2]
            if len(body) == 1 and str(body[0][0]) in _SINGLE:
                paths *= max(1, high - low + 1)
            else:
                paths *= min(1 + _count_paths(body), 1e6) ** min(max(low, high), 40)
        elif kind == "BRANCH":
            paths *= sum(map(_count_paths, value[1]))
        elif kind == "GROUPREF_EXISTS":
            paths *= sum(_count_paths(body) for body in value[1:] if body)
        elif isinstance(inner := value[-1] if isinstance(value, tuple) else value, _parser.SubPattern):
            paths *= _count_paths(inner)
        paths = min(paths, 1e30)
    return paths


def _has_unsupported_part(parts: Any) -> bool:
    """Return whether a part cannot be matched by sets."""
    for part in parts:
        kind, value = str(part[0]), part[1]
        if kind in _SINGLE or kind == "AT":
            continue
        if kind not in ("SUBPATTERN", "BRANCH", *_REPEATS, *_ASSERTS) or (kind == "SUBPATTERN" and any(value[1:3])):
            return True
        if any(_has_unsupported_part(body) for body in (value[1] if kind == "BRANCH" else (value[-1],))):
            return True
    return False
