"""What is wrong with the text of a row, whatever the model: how it was decoded, rendered, answered.

A row that speaks of encodings may hold “Ã©”, one that speaks of markup `&amp;`, one that explains a chat format its
marks: those are looked for where they can only be accidents, and code is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import ftfy
from ftfy.badness import is_bad

Mark = tuple[str, str]
"""A code of `KINDS` and an example."""

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_ON_ENCODINGS = re.compile(
    r"unicode|\butf\b|utf-?\d|encod|decod|charset|mojibake|latin-?1|iso-8859|windows-125|code ?page|code ?point"
    r"|replacement char|byte order|U\+[0-9A-F]{4}",
    re.IGNORECASE,
)
_ON_MARKUP = re.compile(r"</?[a-z][\w-]*(?:\s[^<>]*)?/?>|\b(?:html|xml|svg|jsx|entit(?:y|ies)|escap\w*|markup)\b", re.I)

_CONTROL = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")  # a form feed divides the pages of old sources
_ENTITY = re.compile(
    r"\w&(?:#0?39|#x27|apos|[lr]squo);\w|&(?:quot|[lr]dquo|#34|nbsp|#160|hellip|[mn]dash);|\s&amp;\s"
    r"|(?<!['\"`(])&(?:lt|gt);"
)
# A letter that looks like one of the other script, between two letters of it: a Cyrillic ending of a name is none.
_LOOKALIKE = re.compile("[A-Za-z][асеорхуіѕјАВЕКМНОРСТХ]+[A-Za-z]|[а-яёА-ЯЁ][aceopxyABEKMHOPCTX]+[а-яёА-ЯЁ]")
# The first byte of a UTF-8 sequence and its second, as Latin-1, Windows-1252 and Windows-1251 show them.
_MAYBE_MOJIBAKE = re.compile("[Â-ôРСГ][\x80-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸЂЃѓЉЊЌЋЏђљњќћџЎўЈҐЁЄЇІіґёєјЅѕї]")

RENDERED = {
    "ChatML": re.compile(r"<\|im_start\|>(?:system|user|assistant|tool)\b"),
    "Llama 2": re.compile(r"(?:<s>\s*)?\[INST\].*\[/INST\]", re.DOTALL),
    "Llama 3": re.compile(r"(?:<\|begin_of_text\|>)?\s*<\|start_header_id\|>\w+<\|end_header_id\|>"),
    "Gemma": re.compile(r"(?:<bos>)?<start_of_turn>(?:user|model)\n"),
    "Phi or Zephyr": re.compile(r"<\|(?:system|user|assistant)\|>\s*\n"),
    "gpt-oss": re.compile(r"<\|start\|>(?:system|developer|user|assistant)<\|message\|>"),
    "Alpaca": re.compile(
        r"(?:Below is an instruction[^\n]*\n+)?### Instruction:\s*\n.*?(?:^|\n)### Response:", re.DOTALL
    ),
    "Vicuna": re.compile(r"(?:Human|USER): [^\n].*?(?:^|\s)(?:Assistant|ASSISTANT):", re.DOTALL),
}
"""What a message begins with that has been rendered already; who explains a format does not begin with it so."""
PLAIN = ("Alpaca", "Vicuna")
"""Formats without control tokens: of a row of raw text, its own."""

# One mark, once or repeated: several are Morse code, an emoticon, or another answer that means something.
_WORDLESS = re.compile(r"([.…\-_–—―*?¿!¡,;:\"'“”‘’`~#|/\\])\1*")
_PLACEHOLDER = re.compile(
    r"\[?(?:deleted|removed|empty|no answer|answer|insert answer here|placeholder)\]|#(?:N/A|REF!|VALUE!|NAME\?)|<NA>"
    r"|nan|TODO|TBD|FIXME|lorem ipsum.*",
    re.DOTALL,
)


def text_marks(texts: list[str]) -> Iterator[Mark]:
    """Yield what is wrong with how a row's texts were decoded or escaped."""
    whole = "\n".join(texts)
    if found := _CONTROL.search(whole):
        yield "control-character", f"U+{ord(found[0]):04X}"
    if "\0" in whole:
        yield "null-byte", _around(whole, whole.index("\0"))
    if "&" in whole and (found := _ENTITY.search(_CODE.sub(" ", whole))) and not _ON_MARKUP.search(whole):
        yield "html-entity", repr(found[0].strip())
    if whole.isascii():
        return
    if "\ufeff" in whole:
        yield "byte-order-mark", _around(whole, whole.index("\ufeff"))
    if found := _LOOKALIKE.search(whole):
        yield "mixed-script", _around(whole, found.start())
    lost, broken = "\ufffd" in whole, _MAYBE_MOJIBAKE.search(whole)
    if (not lost and not broken) or _ON_ENCODINGS.search(whole):
        return
    if lost:
        yield "replacement-character", _around(whole, whole.index("\ufffd"))
    if broken and (line := _mojibake(_CODE.sub(" ", whole))):
        yield "mojibake", line


def rendered_as(text: str) -> str | None:
    """Return the name of the format that a text was rendered in already."""
    text = text.lstrip()
    if not text.startswith(("<", "[INST]", "### ", "Below is", "Human:", "USER:")):
        return None
    return next((name for name, pattern in RENDERED.items() if pattern.match(text)), None)


def is_placeholder(answer: str) -> bool:
    """Return whether an answer is nothing but a mark of punctuation, or stands in for one that is missing."""
    answer = answer.strip()
    return bool(_WORDLESS.fullmatch(answer) or _PLACEHOLDER.fullmatch(answer))


def _mojibake(text: str) -> str:
    """Return an example: a line that looks wrong, and that decoding again makes look right."""
    for line in text.split("\n"):
        if not line.isascii() and is_bad(line) and not is_bad(mended := ftfy.fix_encoding(line)) and mended != line:
            at = next(i for i, (a, b) in enumerate(zip(line, mended + " ", strict=False)) if a != b)
            return _around(line, at)
    return ""


def _around(text: str, at: int, width: int = 12) -> str:
    return repr(text[max(0, at - width) : at + width])
