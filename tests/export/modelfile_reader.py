"""Ollama's Modelfile parser (parser/parser.go), character by character: the oracle for what `slimtune export`
writes."""

import unicodedata

INSTRUCTIONS = [
    "FROM", "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "RENDERER", "PARSER", "PARAMETER", "MESSAGE", "REQUIRES",
]  # fmt: skip
GO_SPACE = "".join(chr(c) for c in range(0x110000) if chr(c).isspace() and chr(c) not in "\x1c\x1d\x1e\x1f")


def is_printable(char: str) -> bool:
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Return instructions and values; ValueError where Ollama refuses the text."""
    lines: list[tuple[str, str]] = []
    state, name, buffer = "start", "", ""
    for char in text:
        end, space = char in "\r\n", char in " \t"
        if state == "start":
            if char == "#":
                state = "comment"
            elif not (end or space):
                state, buffer = "name", char if is_printable(char) else ""
        elif state == "comment":
            state = "start" if end else state
        elif state in ("name", "parameter"):
            if space:
                name = to_instruction(buffer) if state == "name" else f"PARAMETER {buffer}"
                state, buffer = "parameter" if name == "PARAMETER" else "value", ""
            elif char.isascii() and (char.isalpha() or (state == "parameter" and (char.isdigit() or char == "_"))):
                buffer += char
            else:
                raise ValueError(f"{buffer + char!r} is not an instruction")
        elif end and (value := unquote(buffer)) is not None:
            lines.append((name, value))
            state, buffer = "start", ""
        elif end or space or is_printable(char):
            buffer += char
    if state in ("name", "parameter") or (state == "value" and unquote(buffer) is None):
        raise ValueError(f"the text ends within {name or buffer}")
    if state == "value":
        lines.append((name, str(unquote(buffer))))
    return lines


def to_instruction(word: str) -> str:
    if word.upper() not in INSTRUCTIONS:
        raise ValueError(f"{word!r} is not an instruction")
    return word.upper()


def unquote(text: str) -> str | None:
    text = text.strip(GO_SPACE)
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
