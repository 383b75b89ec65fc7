"""Issues in the text of a row that do not depend on the model: wrong decoding, markup, placeholders.

A row about encodings may contain “Ã©”, one about markup `&amp;`, one about a chat format its marks. They count only
where they can be nothing but accidents, and not in code.
"""

import re
from collections.abc import Iterator

import ftfy
from ftfy.badness import is_bad

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_ON_ENCODINGS = re.compile(
    r"unicode|\butf\b|utf-?\d|encod|decod|charset|mojibake|latin-?1|iso-8859|windows-125|code ?page|code ?point"
    r"|replacement char|byte order|U\+[0-9A-F]{4}",
    re.IGNORECASE,
)
_ON_MARKUP = re.compile(r"</?[a-z][\w-]*(?:\s[^<>]*)?/?>|\b(?:html|xml|svg|jsx|entit(?:y|ies)|escap\w*|markup)\b", re.I)

# A text begins or ends with it, or a line is nothing else, as LLaVA's rows have it.
_MEDIA = re.compile(r"^\s*<(?:image|video|audio)>|<(?:image|video|audio)>\s*$", re.MULTILINE)
_CONTROL = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")  # a form feed divides the pages of old sources
_ENTITY = re.compile(
    r"\w&(?:#0?39|#x27|apos|[lr]squo);\w|&(?:quot|[lr]dquo|#34|nbsp|#160|hellip|[mn]dash);|\s&amp;\s"
    r"|(?<!['\"`(])&(?:lt|gt);"
)
# A letter that looks like one of the other script, between two letters of that script: not a Cyrillic ending of a name.
_LOOKALIKE = re.compile("[A-Za-z][асеорхуіѕјАВЕКМНОРСТХ]+[A-Za-z]|[а-яёА-ЯЁ][aceopxyABEKMHOPCTX]+[а-яёА-ЯЁ]")
# The first byte of a UTF-8 sequence and its second, as Latin-1, Windows-1252 and Windows-1251 show them.
_MAYBE_MOJIBAKE = re.compile("[Â-ôРСГ][\x80-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸЂЃѓЉЊЌЋЏђљњќћџЎўЈҐЁЄЇІіґёєјЅѕї]")

RENDERED_FORMATS = {
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
"""What a rendered message begins with; a text that explains a format does not begin like this."""
PLAIN_FORMATS = ("Alpaca", "Vicuna")
"""Formats without control tokens; a row of raw text may be written in them."""

# One punctuation mark, once or repeated; several different ones can be Morse code or an emoticon.
_PUNCTUATION = re.compile(r"([.…\-_–—―*?¿!¡,;:\"'“”‘’`~#|/\\])\1*")
_PLACEHOLDER = re.compile(
    r"\[?(?:deleted|removed|empty|no answer|answer|insert answer here|placeholder)\]|#(?:N/A|REF!|VALUE!|NAME\?)|<NA>"
    r"|nan|TODO|TBD|FIXME|lorem ipsum.*",
    re.DOTALL,
)


def find_encoding_issues(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield a code of `FINDING_TYPES` and an example for each way in which texts are decoded or escaped wrongly."""
    whole = "\n".join(texts)
    if found := _CONTROL.search(whole):
        yield "control-character", f"U+{ord(found[0]):04X}"
    if "<" in whole and (found := _MEDIA.search(whole)) and f"</{found[0].strip()[1:]}" not in whole:
        yield "media-placeholder", found[0].strip()
    if "\0" in whole:
        yield "null-byte", _excerpt(whole, whole.index("\0"))
    if "&" in whole and (found := _ENTITY.search(_CODE.sub(" ", whole))) and not _ON_MARKUP.search(whole):
        yield "html-entity", repr(found[0].strip())
    if whole.isascii():
        return
    if "\ufeff" in whole:
        yield "byte-order-mark", _excerpt(whole, whole.index("\ufeff"))
    if found := _LOOKALIKE.search(whole):
        yield "mixed-script", _excerpt(whole, found.start())
    replaced, suspect = "\ufffd" in whole, _MAYBE_MOJIBAKE.search(whole)
    if (not replaced and not suspect) or _ON_ENCODINGS.search(whole):
        return
    if replaced:
        yield "replacement-character", _excerpt(whole, whole.index("\ufffd"))
    if suspect and (line := _find_mojibake(_CODE.sub(" ", whole))):
        yield "mojibake", line


def detect_rendered_chat_format(text: str) -> str | None:
    """Return the name of the chat format in which a text is already rendered; None: it is not."""
    text = text.lstrip()
    if not text.startswith(("<", "[INST]", "### ", "Below is", "Human:", "USER:")):
        return None
    return next((name for name, pattern in RENDERED_FORMATS.items() if pattern.match(text)), None)


def is_placeholder_answer(answer: str) -> bool:
    """Return whether an answer is only a punctuation mark, or a placeholder for a missing one."""
    answer = answer.strip()
    return bool(_PUNCTUATION.fullmatch(answer) or _PLACEHOLDER.fullmatch(answer))


def _find_mojibake(text: str) -> str:
    """Return an example from a line that looks wrong and that looks right when it is decoded again; else empty."""
    for line in text.split("\n"):
        if not line.isascii() and is_bad(line) and not is_bad(repaired := ftfy.fix_encoding(line)) and repaired != line:
            at = next(i for i, (a, b) in enumerate(zip(line, repaired + " ", strict=False)) if a != b)
            return _excerpt(line, at)
    return ""


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 12) : at + 12])
