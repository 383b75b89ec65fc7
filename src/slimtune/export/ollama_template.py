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

from .chat_format_inference import (
    DATE_MARKERS,
    InferredChatFormat,
    JinjaChatTemplate,
    Strip,
    UnsupportedChatTemplate,
    describe_ollama_differences,
    infer_chat_format,
)

_MONTHS = [datetime.date(2000, m, 1).strftime("%b %B").split() for m in range(1, 13)]
_DATE_SLICES = {"Y": "0 4", "y": "2 4", "m": "5 7", "d": "8 10"}


@dataclass(frozen=True)
class OllamaTemplate:
    """The result of converting a chat template."""

    template: str | None  # in Go's syntax; None: it cannot be converted, `notes` says why
    stops: tuple[str, ...] = ()  # special tokens that end an answer
    takes_system_prompt: bool | None = None  # whether the chat template has a place for a system prompt; None: unknown
    notes: tuple[str, ...] = ()  # what the TEMPLATE does differently, one sentence each


def convert_chat_template(tokenizer: Any, adds_bos: bool) -> OllamaTemplate:
    """Convert a tokenizer's chat template.

    `adds_bos`: Ollama itself puts the beginning-of-sequence token before the text, so the TEMPLATE leaves it out.
    """
    try:
        template = JinjaChatTemplate(tokenizer, adds_bos)
        chat = infer_chat_format(template)
        text = _format_go_template(chat)
    except UnsupportedChatTemplate as error:
        reason = str(error)
    except TemplateSyntaxError as error:
        reason = f"the chat template is not valid Jinja ({error})"
    except TemplateError as error:
        reason = f"the chat template refuses a plain conversation ({error})"
    except ValueError:
        reason = "the tokenizer has no chat template, or several without a default"
    else:
        suffix = chat.suffixes.get("assistant", "")
        ends = sorted((suffix.index(t), -len(t), t) for t in template.special_tokens if t in suffix)
        stops = tuple(token for _, _, token in ends[:1])
        notes = tuple(describe_ollama_differences(template, chat))
        return OllamaTemplate(text, stops, chat.system_placement in ("in order", "last"), notes)
    return OllamaTemplate(None, notes=(f"{reason}: no TEMPLATE is written, and Ollama uses its own",))


def _format_go_template(chat: InferredChatFormat) -> str:
    """Return a chat format in Go's syntax: for every conversation it gives the text of `chat.render`."""
    system = ""
    if chat.system_placement == "refused":
        system = _write_error("the chat template refuses system messages")
    elif chat.system_placement == "in order":
        system = _write_message(chat, "system") + escape_go_template_text(chat.suffixes["system"])
        system += _write_if("$last", escape_go_template_text(chat.generation_prompt("system")))
    user = _write_message(chat, "user")
    if chat.system_placement == "last":
        both = _write_message(chat, "system", "$.System") + escape_go_template_text(chat.suffixes["system"])
        both += _write_message(chat, "user", after_system=True)
        user = _write_if("and $last $.System", both, user)
    user += escape_go_template_text(chat.suffixes["user"]) + _write_if(
        "$last", escape_go_template_text(chat.generation_prompt("user"))
    )
    assistant = _write_message(chat, "assistant")
    assistant += _write_if("not $last", escape_go_template_text(chat.suffixes["assistant"]))
    unknown = _write_error("this TEMPLATE knows the roles system, user and assistant only")
    roles = {"system": system, "user": user, "assistant": assistant}
    branches = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in roles.items())
    remember = "{{ $before = .Role }}"
    if chat.system_placement != "in order":
        remember = _write_if('ne .Role "system"', remember)
    last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    body = f"{last}{{{{ {branches}{{{{ else }}}}{unknown}{{{{ end }}}}{remember}"
    return f'{{{{ $before := "" }}}}{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}'


def _write_if(condition: str, text: str, otherwise: str = "") -> str:
    if not text and not otherwise:
        return ""
    other = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{text}{other}{{{{ end }}}}"


def _write_message(chat: InferredChatFormat, role: str, value: str = ".Content", after_system: bool = False) -> str:
    """Write the prefix, chosen by the role before, and the content."""
    *special, (_, prefix, strip) = chat.choices(role, after_system)
    text = escape_go_template_text(prefix) + _write_content(value, strip)
    for befores, prefix, strip in special:
        condition = f"eq $before {' '.join(map(_write_string, befores))}"
        text = _write_if(condition, escape_go_template_text(prefix) + _write_content(value, strip), text)
    return text


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


def _write_error(reason: str) -> str:
    """Write an error: Go's templates cannot raise one, and silently dropping a message would be worse."""
    return f'{{{{ slice "{reason}" 99 }}}}'


def escape_go_template_text(text: str) -> str:
    """Return a Go template that gives `text`, with characters that a Modelfile can carry.

    Braces, runs of quotes and characters that Ollama drops become Go strings; everything else stays as it is.
    """
    before, *rest = re.split(f"{DATE_MARKERS[0]}(.*?){DATE_MARKERS[1]}", text, flags=re.DOTALL)
    out = ""
    for piece in re.findall(r'\{+|"+|[^{"]+', before):
        quoted = piece[0] == "{" or (piece[0] == '"' and len(piece) > 2)
        for plain, run in itertools.groupby(piece, key=lambda c: not quoted and (is_go_printable(c) or c in "\n\t")):
            part = "".join(run)
            out += part if plain else f"{{{{ {_write_string(part)} }}}}"
    for style, after in zip(rest[::2], rest[1::2], strict=True):
        out += _write_date(style) + escape_go_template_text(after)
    return out


def is_go_printable(char: str) -> bool:
    """Return whether Go calls a character printable (`strconv.IsPrint`); Ollama drops the others."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def _write_string(text: str) -> str:
    """Return a Go string in ASCII that never contains two quotes in a row."""

    def escape(char: str) -> str:
        if " " <= char <= "~" and char not in '"\\':
            return char
        return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"

    return f'"{"".join(map(escape, text))}"'


def _write_date(style: str) -> str:
    """Write today's date in a strftime format; Ollama's currentDate gives it as 2031-03-09."""
    out = ""
    for code, text in re.findall(r"%(-?.)|([^%]+)", style.replace("%F", "%Y-%m-%d")):
        if text or code == "%":
            out += escape_go_template_text(text or "%")
        elif code in _DATE_SLICES:
            out += f"{{{{ slice currentDate {_DATE_SLICES[code]} }}}}"
        elif code in "bhB":
            names = [month[code == "B"] for month in _MONTHS]
            chain = "{{ else ".join(f'if eq $month "{m:02}" }}}}{name}' for m, name in enumerate(names, 1))
            out += f"{{{{ $month := slice currentDate 5 7 }}}}{{{{ {chain}{{{{ end }}}}"
        else:
            raise UnsupportedChatTemplate(f"the chat template writes the date as {style!r}, which Ollama cannot")
    return out
