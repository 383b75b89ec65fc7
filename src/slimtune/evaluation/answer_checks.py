"""What can be said of an answer without a judge: measures that every answer gets, and checks that are asked for.

tokens          how many it has, the one that ends it included
repetition      share of its runs of four words that occurred in it before; 0: none, towards 1: it goes round
ended           it came to its end before --max-new-tokens
exact           it is the reference, but for white space at the ends
chrf            chrF against the reference, 0 to 100 (sacrebleu)
json            it is JSON and nothing else
regex:PATTERN   PATTERN is found in it
json-schema:F   it is JSON that the schema in file F admits (jsonschema)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError, nearest

Check = Callable[[str, str], bool | float]
"""Answer and reference to what is found."""
NAMES = ("exact", "chrf", "json", "regex:PATTERN", "json-schema:FILE")
RUN = 4


def build_checks(asked: Sequence[str]) -> dict[str, Check]:
    """Return checks by their names as asked for.

    Raises:
        UsageError: an unknown name, a pattern that is none, a schema that cannot be read or is none.
        ModelError: a package is missing.
    """
    return {name: _check(name) for name in asked}


def repetition(text: str) -> float:
    """Return the share of a text's runs of four words that occurred in it before, 0 to 1."""
    words = text.split()
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _check(name: str) -> Check:
    kind, _, of = name.partition(":")
    match kind, bool(of):
        case "exact", False:
            return lambda answer, reference: answer.strip() == reference.strip()
        case "json", False:
            return lambda answer, _: _parsed(answer) is not None
        case "chrf", False:
            return _chrf()
        case "regex", True:
            return _regex(of)
        case "json-schema", True:
            return _schema(Path(of))
    raise UsageError(f"there is no check {name!r}{nearest(kind, NAMES)}", f"one of {', '.join(NAMES)}")


def _regex(pattern: str) -> Check:
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise UsageError(f"{pattern!r} is no regular expression: {e}", "one as Python's re takes it") from e
    return lambda answer, _: compiled.search(answer) is not None


def _parsed(answer: str) -> tuple[Any] | None:
    try:
        return (json.loads(answer),)
    except (json.JSONDecodeError, RecursionError):
        return None


def _schema(file: Path) -> Check:
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as e:
        raise _missing("jsonschema", "json-schema") from e
    try:
        schema = json.loads(file.read_text())
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, SchemaError) as e:
        said = str(e).partition("\n")[0]
        raise UsageError(f"{file} is no JSON schema that can be read: {said}", "a file of one JSON schema") from e
    validator = kind(schema)

    def admits(answer: str, _: str) -> bool:
        found = _parsed(answer)
        return found is not None and validator.is_valid(found[0])

    return admits


def _chrf() -> Check:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as e:
        raise _missing("sacrebleu", "chrf") from e
    metric = CHRF()
    return lambda answer, reference: metric.sentence_score(answer, [reference]).score


def _missing(package: str, check: str) -> ModelError:
    return ModelError(
        f"the check {check} needs the package {package}, which is not installed",
        hint="pip install 'slimtune[eval]'",
    )
