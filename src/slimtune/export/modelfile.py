"""Ollama's Modelfile: lines written so that Ollama reads back what was meant, and nothing else.

    INSTRUCTION value        value: bare to the end of the line, or between " " or triple quotes, over several lines

The quotes know no escape: a quoted value ends at the first line end that its closing quotes stand before. And of a
value's characters Ollama keeps only those that Go calls printable; a no-break space, say, would vanish without a word.
So each value is quoted in one way after another until reading it as Ollama does (`read`) gives back the very value; a
value for which none does is refused. What stands in a value can therefore never become an instruction.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..errors import UsageError, format_names

Line = tuple[str, str]
"""Instruction in capitals ("PARAMETER stop" for a parameter), and its value."""

_COMMANDS = (
    "FROM",
    "LICENSE",
    "TEMPLATE",
    "SYSTEM",
    "ADAPTER",
    "RENDERER",
    "PARSER",
    "PARAMETER",
    "MESSAGE",
    "REQUIRES",
)
_TRIMMED = "".join(chr(c) for c in range(0x110000) if chr(c).isspace() and chr(c) not in "\x1c\x1d\x1e\x1f")


def written(lines: Sequence[Line]) -> str:
    """Return the text of a Modelfile.

    Args:
        lines: instructions in order, `FROM` among them.

    Raises:
        UsageError: a value that no quoting carries.
    """
    text = "".join(f"{name} {_quoted(name, value)}\n" for name, value in lines)
    if read(text) != list(lines):
        raise UsageError("these values do not come out of the Modelfile as they went in", hint="change their quotes")
    return text


def _quoted(name: str, value: str) -> str:
    if lost := sorted({c for c in value if not _kept(c)}):
        raise UsageError(
            f"{name} holds characters that Ollama drops from a Modelfile: {format_names(f'U+{ord(c):04X}' for c in lost)}",
            "printable characters, spaces, tabs and line ends",
            "replace them (a no-break space by a space)",
        )
    bare = value and "\n" not in value and "\r" not in value and value == value.strip() and value[0] not in "\"'#"
    forms = [f'"""{value}"""', f'"{value}"']
    if name not in ("TEMPLATE", "SYSTEM"):
        forms = [*([value] if bare and name != "PARAMETER stop" else ()), *reversed(forms)]
    for form in forms:
        if _read_or_none(f"{name} {form}\n") == [(name, value)]:
            return form
    raise UsageError(
        f"{name} cannot be quoted in a Modelfile: {value!r}",
        "no line that ends in double quotes, since Ollama knows no escape for them",
        "end that line with another character, or rename the file",
    )


def printable(char: str) -> bool:
    """Return whether Go calls a character printable (`strconv.IsPrint`)."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def _kept(char: str) -> bool:
    return printable(char) or char in "\t\n\r"


def _read_or_none(text: str) -> list[Line] | None:
    try:
        return read(text)
    except ValueError:
        return None


def read(text: str) -> list[Line]:
    """Read a Modelfile as Ollama's parser/parser.go does, character by character.

    Raises:
        ValueError: it refuses the text.
    """
    lines: list[Line] = []
    state, name, held = "nothing", "", ""
    for char in text:
        end, space = char in "\r\n", char in " \t"
        if state == "nothing":
            if char == "#":
                state = "comment"
            elif not (end or space):
                state, held = "name", char if printable(char) else ""
        elif state == "comment":
            state = "nothing" if end else state
        elif state in ("name", "parameter"):
            if space:
                name = _instruction(held) if state == "name" else f"PARAMETER {held}"
                state, held = "parameter" if name == "PARAMETER" else "value", ""
            elif char.isascii() and (char.isalpha() or (state == "parameter" and (char.isdigit() or char == "_"))):
                held += char
            else:
                raise ValueError(f"{held + char!r} is no instruction")
        elif end and (value := _unquoted(held)) is not None:
            lines.append((name, value))
            state, held = "nothing", ""
        elif end or space or printable(char):
            held += char
    if state in ("name", "parameter") or (state == "value" and _unquoted(held) is None):
        raise ValueError(f"the text ends within {name or held}")
    if state == "value":
        lines.append((name, str(_unquoted(held))))
    return lines


def _instruction(word: str) -> str:
    if word.upper() not in _COMMANDS:
        raise ValueError(f"{word!r} is no instruction")
    return word.upper()


def _unquoted(held: str) -> str | None:
    """Return the value, None while its quotes are open."""
    held = held.strip(_TRIMMED)
    for quotes in ('"""', '"'):
        if held.startswith(quotes):
            closed = len(held) >= 2 * len(quotes) and held.endswith(quotes)
            return held[len(quotes) : -len(quotes)] if closed else None
    return held
