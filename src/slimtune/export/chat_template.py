"""A Jinja chat template as an Ollama TEMPLATE: learnt, written in Go's syntax, and proven to give the same text.

Ollama runs the TEMPLATE on `.Messages` (each with `.Role` and `.Content`; neighbours of one role are joined by an empty
line before) and `.System` (all system messages). What is written:

    {{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}gap{{ .Content }}after{{ else if … }}{{ end }}prompt{{ end }}

An answer that the conversation ends with is left open: the model goes on from it, as `continue_final_message` in
transformers. The proof renders both templates over conversations with one and several turns, with and without a system
prompt, whose contents hold what might be mistaken for syntax. A TEMPLATE that differs anywhere is not written.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from .go_template import GoTemplateError, render
from .go_writer import go
from .infer_template import LATE, PLAIN, ROLES, Chat, Grammar, Messages, NotTurned, learn, messages_of

_DAY = datetime.date(2031, 3, 9)
_CONTENTS = (
    ("Define patience.", "A minor form of despair.", "And hope?", "Desire and expectation.", "Go on.", "No.", "Why?"),
    (" Größe\n", "\n嘘 🙂\t", "\r\n a\n\nb ", "  x", "y\n", "\tz ", " w "),
    ('{{ .Role }} """', "{% if x %}{{- y }}", "<b>user</b> system:", "[x] \\n %s", "assistant", "'{'", "}} {{ end }}"),
)
_WITHOUT = ": no TEMPLATE is written, and Ollama guesses one or sends the bare words"
_TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Turned:
    """What became of a chat template.

    Args:
        template: in Go's syntax; None: it could not be turned, `notes` says what part.
        stops: special tokens that stand after an answer.
        system: whether the chat template has a place for a system prompt; None: not learnt.
        notes: what the TEMPLATE does not do, each a sentence.
    """

    template: str | None
    stops: tuple[str, ...] = ()
    system: bool | None = None
    notes: tuple[str, ...] = ()


def turn(tokenizer: Any, adds_bos: bool) -> Turned:
    """Turn a tokenizer's chat template into Ollama's syntax.

    Args:
        tokenizer: of the trained model.
        adds_bos: whether Ollama puts the beginning-of-sequence token before the text itself. The TEMPLATE then leaves
            it out, or it would stand there twice.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError:
        return Turned(None, notes=("the tokenizer has no chat template, or several and no default" + _WITHOUT,))
    chat = Chat(tokenizer, adds_bos)
    try:
        learnt = learn(chat)
        template = go(learnt)
        _prove(chat, template, learnt)
    except (NotTurned, GoTemplateError) as error:
        return Turned(None, notes=(f"{error}{_WITHOUT}",))
    except TemplateSyntaxError as error:
        return Turned(None, notes=(f"the chat template is not valid Jinja ({error}){_WITHOUT}",))
    except TemplateError as error:
        return Turned(None, notes=(f"the chat template refuses a plain conversation ({error}){_WITHOUT}",))
    after = learnt.after.get("assistant", "")
    ends = sorted((after.index(t), -len(t), t) for t in chat.special if t in after)
    stops = (ends[0][2],) if ends else ()
    return Turned(template, stops, learnt.system in ("in order", "last"), tuple(_notes(chat, template, learnt)))


def _data(messages: Messages) -> dict[str, Any]:
    """Return what Ollama hands a template."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    told = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    return {"System": system, "Messages": told, "Tools": None, "Response": ""}


def _prove(chat: Chat, template: str, learnt: Grammar) -> None:
    shapes = [*PLAIN, *(f"s{s}" for s in PLAIN)] if learnt.system in ("in order", "last") else PLAIN
    for shape in shapes:
        for contents in _CONTENTS:
            messages = messages_of(shape, contents[: len(shape)])
            wanted = chat.render(messages, today=_DAY)
            if (got := render(template, _data(messages), _DAY)) != wanted:
                at = len(os.path.commonprefix([wanted, got]))  # noqa: RUF071 (texts, not paths)
                here, there = (f"{t[max(0, at - 20) : at + 20]!r}" for t in (wanted, got))
                raise NotTurned(f"the chat template gives …{here}… where what was learnt of it gives …{there}…")


def _notes(chat: Chat, template: str, learnt: Grammar) -> list[str]:
    """Say what the TEMPLATE does otherwise than the chat template."""

    def differs(shape: str, contents: Sequence[str], **settings: Any) -> bool:
        messages = messages_of(shape, contents)
        try:
            wanted = chat.render(messages, today=_DAY, **settings)
        except TemplateError:
            return False
        except NotTurned:
            return True
        try:
            return render(template, _data(messages), _DAY) != wanted
        except GoTemplateError:
            return True

    plain = _CONTENTS[0]
    notes = []
    if learnt.system == "refused":
        notes.append("the chat template refuses system messages: so does the TEMPLATE, by an error of Ollama's")
    if learnt.system == "left out":
        notes.append("the chat template leaves system messages out: so does the TEMPLATE")
    if differs("u", plain[:1], tools=[_TOOL]):
        notes.append("tools are not in the TEMPLATE: Ollama will say that the model does not support them")
    if differs("uau", (plain[0], "<think>\nHm.\n</think>\n\nDespair.", plain[2])):
        notes.append(
            "the chat template takes thoughts (<think>…</think>) out of earlier answers: the TEMPLATE does not"
        )
    if any(differs("u", plain[:1], enable_thinking=on) for on in (True, False)):
        notes.append("enable_thinking is not in the TEMPLATE: it writes what the chat template writes without it")
    late = [s for s in LATE if learnt.system == "in order" or s == "au"]
    if odd := [s for s in late if differs(s, plain[: len(s)])]:
        told = ", ".join(" ".join(ROLES[r] for r in s) for s in odd)
        notes.append(f"conversations that run so are written otherwise than by the chat template: {told}")
    if chat.writes_bos is False:
        notes.append(f"Ollama puts {chat.bos} before the text, which the chat template does not")
    return notes
