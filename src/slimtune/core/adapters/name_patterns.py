"""Regular expressions of configs, matched against module names in a bounded time.

A config can come from a stranger, and a pattern such as `(.*)*!` keeps Python's `re` busy for ever. The package `regex`
has the same syntax and can stop.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TypeVar

from ...errors import ConfigError

Value = TypeVar("Value")
MAX_LENGTH = 20_000
"""Most characters in a pattern."""
MAX_REPEATED_GROUPS = 6
"""Most groups with `+` or `{…}` behind them: each doubles the time and the memory that `regex` needs to compile."""
MAX_SECONDS = 2.0
"""Time that a pattern may take for all names together; a pattern that people write takes microseconds for each."""


class ModuleNameRegex:
    """A regular expression for module names.

    Raises:
        ConfigError: it is malformed, or takes too long.
    """

    def __init__(self, text: str) -> None:
        self.shown = f"{text[:100]!r}{'…' if len(text) > 100 else ''}"
        self.seconds_left = MAX_SECONDS
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"{self.shown} has {len(text)} characters", f"at most {MAX_LENGTH} characters")
        import regex  # takes a while, and few configs have a pattern

        try:
            re.compile(text)  # PEFT matches with it
            if len(re.findall(r"(?<![\w\].])[+{]", text)) > MAX_REPEATED_GROUPS:
                raise RecursionError
            self.compiled = regex.compile(text)
        except (re.error, regex.error, OverflowError, RecursionError) as e:
            has_words = isinstance(e, re.error | regex.error)
            problem = str(e) if has_words else "it is nested too deeply or repeats too often"
            message = f"{self.shown} is not a regular expression: {problem}"
            word = "".join(re.findall(r"[A-Za-z_]\w*", text)[-1:])
            hint = f"'.*{word}' for every name that ends with {word}, or a list of names: [{word}]" if word else ""
            raise ConfigError(message, "a regular expression, where * repeats what stands before it", hint) from None

    def matches(self, name: str, starts: Sequence[int] = (0,)) -> bool:
        """Return whether the pattern matches `name` to its end from one of the positions `starts`."""
        started = time.process_time()
        try:
            return any(self.compiled.fullmatch(name, start, timeout=self.seconds_left) for start in starts)
        except TimeoutError:
            raise ConfigError(f"{self.shown} takes too long to match", "a simpler regular expression") from None
        finally:
            self.seconds_left = max(1e-3, self.seconds_left - (time.process_time() - started))


@cache
def make_module_name_regex(text: str) -> ModuleNameRegex:
    """Return the pattern for a text, made once."""
    return ModuleNameRegex(text)


def make_config_error_if_bad_pattern(pattern: str) -> ConfigError | None:
    """Return what is wrong with a config's pattern; None: it is well formed."""
    try:
        make_module_name_regex(pattern)
    except ConfigError as e:
        return e
    return None


def find_matching_pattern(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that matches `name` or its end after a dot, or None."""
    starts = (0, *(i + 1 for i, c in enumerate(name) if c == "."))
    return next((p for p in patterns if make_module_name_regex(p).matches(name, starts)), None)


def get_value_by_pattern(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of the first pattern that matches `name` (see `find_matching_pattern`), or the default."""
    key = find_matching_pattern(patterns, name)
    return default if key is None else patterns[key]
