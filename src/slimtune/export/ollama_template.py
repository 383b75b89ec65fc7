"""Write a chat template as an Ollama TEMPLATE, which is Go's text/template.

Ollama runs the TEMPLATE on `.Messages` (each with `.Role` and `.Content`; neighbours of one role joined by an empty
line) and `.System` (all system messages). The TEMPLATE has this form:

    {{ range $i, $_ := .Messages }}
    {{ if eq .Role "user" }}prefix{{ .Content }}suffix{{ else if … }}{{ end }}prompt{{ end }}

No action trims the text around it (`{{-`), so line ends of the prompt stay as they are. An answer at the end of the
conversation stays open, as with `continue_final_message` in transformers. The inferred form is compared with the chat
template before anything is written; the tests run every TEMPLATE in Go's own engine.
"""

import datetime
import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from .infer_template import (
    DATE_MARKERS,
    ChatFormat,
    JinjaTemplate,
    Strip,
    UnsupportedTemplate,
    infer_template,
    list_differences,
)

_NO_TEMPLATE = ": no TEMPLATE is written, and Ollama uses its own"
_MONTHS = [datetime.date(2000, m, 1).strftime("%b %B").split() for m in range(1, 13)]
_DATE_SLICES = {"Y": "0 4", "y": "2 4", "m": "5 7", "d": "8 10"}
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\v": "\\v", "\f": "\\f"}


@dataclass(frozen=True)
class ConvertedTemplate:
    """The result of converting a chat template.

    Args:
        template: in Go's syntax; None: it cannot be converted, `notes` says why.
        stops: special tokens that end an answer.
        system: whether the chat template has a place for a system prompt; None: unknown.
        notes: what the TEMPLATE does differently, one sentence each.
    """

    template: str | None
    stops: tuple[str, ...] = ()
    system: bool | None = None
    notes: tuple[str, ...] = ()


def convert_chat_template(tokenizer: Any, adds_bos: bool) -> ConvertedTemplate:
    """Convert a tokenizer's chat template.

    Args:
        tokenizer: of the trained model.
        adds_bos: whether Ollama itself puts the beginning-of-sequence token before the text. The TEMPLATE then leaves
            it out; otherwise the prompt would begin with two.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError:
        reason = "the tokenizer has no chat template, or several without a default"
        return ConvertedTemplate(None, notes=(reason + _NO_TEMPLATE,))
    template = JinjaTemplate(tokenizer, adds_bos)
    try:
        chat = infer_template(template)
        text = write_go_template(chat)
    except UnsupportedTemplate as error:
        return ConvertedTemplate(None, notes=(f"{error}{_NO_TEMPLATE}",))
    except TemplateSyntaxError as error:
        return ConvertedTemplate(None, notes=(f"the chat template is not valid Jinja ({error}){_NO_TEMPLATE}",))
    except TemplateError as error:
        return ConvertedTemplate(
            None, notes=(f"the chat template refuses a plain conversation ({error}){_NO_TEMPLATE}",)
        )
    suffix = chat.suffixes.get("assistant", "")
    ends = sorted((suffix.index(t), -len(t), t) for t in template.special_tokens if t in suffix)
    return ConvertedTemplate(
        text,
        stops=(ends[0][2],) if ends else (),
        system=chat.system in ("in order", "last"),
        notes=tuple(list_differences(template, chat)),
    )


def write_go_template(chat: ChatFormat) -> str:
    """Return a chat format in Go's syntax: for every conversation it gives the text of `chat.render`.

    Raises:
        UnsupportedTemplate: it writes a date in a format that Go cannot make.
    """
    system = ""
    if chat.system == "refused":
        system = _write_error("the chat template refuses system messages")
    elif chat.system == "in order":
        system = _write_message(chat, "system") + write_literal(chat.suffixes["system"]) + _write_prompt(chat, "system")
    user = _write_message(chat, "user")
    if chat.system == "last":
        both = _write_message(chat, "system", "$.System") + write_literal(chat.suffixes["system"])
        both += _write_message(chat, "user", after_system=True)
        user = f"{{{{ if and $last $.System }}}}{both}{{{{ else }}}}{user}{{{{ end }}}}"
    user += write_literal(chat.suffixes["user"]) + _write_prompt(chat, "user")
    suffix = write_literal(chat.suffixes["assistant"])
    assistant = _write_message(chat, "assistant") + (f"{{{{ if not $last }}}}{suffix}{{{{ end }}}}" if suffix else "")
    body = (
        f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}'
        f"{{{{ else }}}}{_write_error('this TEMPLATE knows the roles system, user and assistant only')}{{{{ end }}}}"
    )
    before, remember = "", ""
    if "$before" in body:
        before, remember = '{{ $before := "" }}', "{{ $before = .Role }}"
        if chat.system != "in order":
            remember = f'{{{{ if ne .Role "system" }}}}{remember}{{{{ end }}}}'
    last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    return f"{before}{{{{ range $i, $_ := .Messages }}}}{last}{body}{remember}{{{{ end }}}}"


def _write_message(chat: ChatFormat, role: str, value: str = ".Content", after_system: bool = False) -> str:
    """Write the prefix, chosen by the role before, and the content."""
    *special, (_, default, default_strip) = chat.choices(role, after_system)
    same_strip = all(strip == default_strip for _, _, strip in special)

    def piece(prefix: str, strip: Strip) -> str:
        return write_literal(prefix) + ("" if same_strip else _write_content(value, strip))

    text = piece(default, default_strip)
    if special:
        branches = "{{ else ".join(
            f"if eq $before {' '.join(map(_write_string, befores))} }}}}{piece(prefix, strip)}"
            for befores, prefix, strip in special
        )
        otherwise = f"{{{{ else }}}}{text}" if text else ""
        text = f"{{{{ {branches}{otherwise}{{{{ end }}}}"
    return text + (_write_content(value, default_strip) if same_strip else "")


def _write_content(value: str, strip: Strip) -> str:
    """Write a content; each round of the loop strips one character, so there are enough rounds."""
    if not any(strip):
        return f"{{{{ {value} }}}}"
    all_but_one = "(len (slice $x 1))"
    ends = [("slice $x 0 1", "slice $x 1"), (f"slice $x {all_but_one}", f"slice $x 0 {all_but_one}")]
    tests = "{{ else ".join(
        f"if eq ({end}) {' '.join(map(_write_string, characters))} }}}}{{{{ $x = {rest} }}}}"
        for (end, rest), characters in zip(ends, strip, strict=True)
        if characters
    )
    loop = f"{{{{ range len $x }}}}{{{{ {tests}{{{{ else }}}}{{{{ break }}}}{{{{ end }}}}{{{{ end }}}}"
    return f"{{{{ $x := {value} }}}}{loop}{{{{ $x }}}}"


def _write_prompt(chat: ChatFormat, role: str) -> str:
    text = write_literal(chat.prompt(role))
    return f"{{{{ if $last }}}}{text}{{{{ end }}}}" if text else ""


def _write_error(reason: str) -> str:
    """Write an error: Go's templates cannot raise one, and silently dropping a message would be worse."""
    return f'{{{{ slice "{reason}" 99 }}}}'


def write_literal(text: str) -> str:
    """Return a Go template that gives `text`, with characters that a Modelfile can carry.

    Raises:
        UnsupportedTemplate: it contains a date in a format that Go cannot make.
    """
    pieces = re.split(f"{DATE_MARKERS[0]}(.*?){DATE_MARKERS[1]}", text, flags=re.DOTALL)
    return "".join(_write_date(p) if i % 2 else _write_plain(p) for i, p in enumerate(pieces))


def is_printable(char: str) -> bool:
    """Return whether Go calls a character printable (`strconv.IsPrint`); Ollama drops the others."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def _write_plain(text: str) -> str:
    """Write braces, runs of quotes and characters that Ollama drops as Go strings, everything else as it is."""
    out = ""
    for piece in re.findall(r'\{+|"+|[^{"]+', text):
        quoted = piece[0] == "{" or (piece[0] == '"' and len(piece) > 2)
        for plain, run in itertools.groupby(piece, key=lambda c: not quoted and (is_printable(c) or c in "\n\t")):
            part = "".join(run)
            out += part if plain else f"{{{{ {_write_string(part)} }}}}"
    return out


def _write_string(text: str) -> str:
    """Return a Go string in ASCII that never contains two quotes in a row."""

    def escape(char: str) -> str:
        if " " <= char <= "~" and char not in '"\\':
            return char
        return _ESCAPES.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")

    return f'"{"".join(map(escape, text))}"'


def _write_date(style: str) -> str:
    """Write today's date in a strftime format; Ollama's currentDate gives it as 2031-03-09."""
    out = ""
    for code, text in re.findall(r"%(-?.)|([^%]+)", style.replace("%F", "%Y-%m-%d")):
        if text or code == "%":
            out += write_literal(text or "%")
        elif code in _DATE_SLICES:
            out += f"{{{{ slice currentDate {_DATE_SLICES[code]} }}}}"
        elif code in "bhB":
            names = [month[code == "B"] for month in _MONTHS]
            chain = "{{ else ".join(f'if eq $month "{m:02}" }}}}{name}' for m, name in enumerate(names, 1))
            out += f"{{{{ $month := slice currentDate 5 7 }}}}{{{{ {chain}{{{{ end }}}}"
        else:
            raise UnsupportedTemplate(f"the chat template writes the date as {style!r}, which Ollama cannot")
    return out
