"""What a Jinja chat template does, learnt by rendering it: which text stands before, between and after the messages.

    text = gap("", r₁) content₁ gap(r₁, r₂) content₂ … contentₙ gap(rₙ, "prompt")           r: system, user or assistant

Marks stand for the contents of conversations of a few shapes, and the gaps between the marks are read off. A template
is of this kind if each gap depends on the two roles alone; all that differs from that is named. Two things more are
learnt: whether white space around a content is taken off, and where the system prompt stands: where it was given, or
before the last user message (Mistral's way).
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

PLAIN = ("u", "uau", "uauau")
"""Shapes of the conversations a template must render: what Ollama asks for ends with the user's words."""
LATE = ("s", "sau", "au", "usu", "uasu", "uas")
"""Shapes met less often, which many templates refuse."""
ROLES = {"s": "system", "u": "user", "a": "assistant"}
BLANK = " \n\t\r\v\f"
"""What Python strips and a TEMPLATE can; the rest of Unicode's white space stays in Ollama."""
DATE = ("\ue010", "\ue011")
"""What encloses a date's format, in place of the date, in a text rendered for learning."""
_NOW = f"{{% macro strftime_now(style) %}}{{{{ '{DATE[0]}' + style + '{DATE[1]}' }}}}{{% endmacro %}}{{{{ '' }}}}"
_MARK = "\ue000{}\ue001"
_PAD = ("\n\n \t\r", "\r \t\n\n")
_TRIMS = ("", "\n", BLANK)

Messages = list[dict[str, str]]
Pair = tuple[str, str]
"""Roles of two neighbours; "" before the first message, "prompt" after the last."""


class NotTurned(Exception):
    """A chat template, or a part of it, that is not of the kind described above; the text says which part."""


@dataclass
class Grammar:
    """What was learnt.

    Args:
        gaps: the text between two neighbours.
        after: for each role, the part of the gaps after it that is the same whatever follows.
        trims: characters that are taken off the second one's content: at its left, at its right.
        system: "in order", "last" (before the last user message), "refused" or "left out".
    """

    gaps: dict[Pair, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    trims: dict[Pair, tuple[str, str]] = field(default_factory=dict)
    system: str = "in order"


class Chat:
    """A tokenizer's chat template as text.

    Args:
        tokenizer: with a chat template.
        cut_bos: whether the beginning-of-sequence token in front is left to whoever tokenizes the text.
    """

    def __init__(self, tokenizer: Any, cut_bos: bool) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        self.dated = {"chat_template": _NOW + source} if "strftime_now" in source else {}
        self.bos = tokenizer.bos_token if cut_bos else None
        self.writes_bos: bool | None = None
        known = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self.special = [t for t in known if t.strip()]

    def render(
        self, messages: Messages, prompt: bool = True, today: datetime.date | None = None, **settings: Any
    ) -> str:
        """Return the text of a conversation, without the token in front where that is cut.

        Args:
            messages: with `role` and `content`.
            prompt: whether the text asks for the assistant's next message.
            today: what the template takes for today; None: a mark that holds the date's format.
            settings: further variables of the template.

        Raises:
            TemplateError: the template refuses the messages.
            NotTurned: the token in front is not always there.
        """
        given = {"tokenize": False, "add_generation_prompt": prompt, **self.dated, **settings}
        try:
            text = self.tokenizer.apply_chat_template(messages, **given)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        if today:
            text = re.sub("(.*?)".join(DATE), lambda found: today.strftime(found[1]), text)
        if self.bos:
            if self.writes_bos is None:
                self.writes_bos = text.startswith(self.bos)
            if self.writes_bos is not text.startswith(self.bos):
                raise NotTurned(f"the chat template writes {self.bos} before some conversations only")
            text = text.removeprefix(self.bos)
        return text


def messages_of(shape: str, contents: Sequence[str]) -> Messages:
    """Return a conversation: roles by their letters in `shape`, contents in order."""
    return [{"role": ROLES[r], "content": c} for r, c in zip(shape, contents, strict=True)]


def learn(chat: Chat) -> Grammar:
    """Learn a chat template.

    Raises:
        NotTurned: it is of another kind.
        TemplateError: it refuses a conversation that Ollama may ask for.
    """
    learnt = Grammar()
    for shape in PLAIN:
        _take(chat, shape, learnt)
    learnt.system = _place_of_system(chat)
    if learnt.system in ("in order", "last"):
        for shape in PLAIN:
            _take(chat, f"s{shape}", learnt)
    for shape in LATE if learnt.system == "in order" else ("au",):
        _take_if_new(chat, shape, learnt)
    for role in ROLES.values():
        ends = [text for (before, _), text in learnt.gaps.items() if before == role]
        if ends:
            learnt.after[role] = _common([*ends, *_closing(chat, role, learnt)], chat.special)
    return learnt


def _common(texts: list[str], special: Sequence[str]) -> str:
    """Return the longest beginning that all texts share and that ends within no special token."""
    first, last = min(texts), max(texts)  # whatever these two share lies at the beginning of all
    common = next((first[:i] for i, c in enumerate(first) if last[i : i + 1] != c), first)
    for size in range(len(common), 0, -1):
        if not any(s in t[max(0, size - len(s) + 1) : size + len(s) - 1] for t in texts for s in special):
            return common[:size]
    return ""


def _marked(chat: Chat, shape: str, prompt: bool = True, padded: int | None = None) -> tuple[str, list[int], list[str]]:
    """Return the text of a shape, its messages as they follow in the text, and the texts around them.

    Raises:
        NotTurned: a content is left out, or stands there twice.
        TemplateError: the template refuses the shape.
    """
    marks = [_MARK.format(i) for i in range(len(shape))]
    contents = [f"{_PAD[0]}{m}{_PAD[1]}" if i == padded else m for i, m in enumerate(marks)]
    text = chat.render(messages_of(shape, contents), prompt)
    for role, mark in zip(shape, marks, strict=True):
        if (times := text.count(mark)) != 1:
            how = "more than once" if times else "not at all, or not as plain text"
            raise NotTurned(f"the chat template writes {ROLES[role]} messages {how}")
    order = sorted(range(len(shape)), key=lambda i: text.index(marks[i]))
    gaps, at = [], 0
    for i in order:
        gaps.append(text[at : text.index(marks[i])])
        at = text.index(marks[i]) + len(marks[i])
    return text, order, [*gaps, text[at:]]


def _pairs(shape: str, order: Sequence[int]) -> list[Pair]:
    roles = ["", *(ROLES[shape[i]] for i in order), "prompt"]
    return list(itertools.pairwise(roles))


def _take(chat: Chat, shape: str, learnt: Grammar) -> None:
    """Add what a shape shows."""
    text, order, gaps = _marked(chat, shape)
    if learnt.system != "last" and order != sorted(order):
        raise NotTurned("the chat template changes the order of messages")
    pairs = _pairs(shape, order)
    for pair, gap in zip(pairs, gaps, strict=True):
        if learnt.gaps.setdefault(pair, gap) != gap:
            raise NotTurned(f"the text {_where(pair)} is not the same everywhere: {learnt.gaps[pair]!r} and {gap!r}")
    for pair, i in zip(pairs, order, strict=False):
        trims = _trims(text, _marked(chat, shape, padded=i)[0], _MARK.format(i))
        if trims is None:
            raise NotTurned(f"the chat template changes {ROLES[shape[i]]} messages that white space stands around")
        if learnt.trims.setdefault(pair, trims) != trims:
            raise NotTurned(f"white space around {ROLES[shape[i]]} messages is not taken off everywhere")


def _take_if_new(chat: Chat, shape: str, learnt: Grammar) -> None:
    """Add what a shape of the rarer kind shows, where it contradicts nothing; the proof tells what does."""
    more = Grammar(dict(learnt.gaps), {}, dict(learnt.trims), learnt.system)
    try:
        _take(chat, shape, more)
    except (NotTurned, TemplateError):
        return
    learnt.gaps, learnt.trims = more.gaps, more.trims


def _place_of_system(chat: Chat) -> str:
    try:
        _marked(chat, "su")
        order = _marked(chat, "suau")[1]
    except TemplateError:
        return "refused"
    except NotTurned:
        return "left out"
    return "last" if order == [1, 2, 0, 3] else "in order"


def _trims(text: str, padded: str, mark: str) -> tuple[str, str] | None:
    for left in _TRIMS:
        for right in _TRIMS:
            if text.replace(mark, _PAD[0].lstrip(left or "-") + mark + _PAD[1].rstrip(right or "-")) == padded:
                return left, right
    return None


def _closing(chat: Chat, role: str, learnt: Grammar) -> list[str]:
    """Return the text after a last message that no answer is asked for: some templates end a role's text only there."""
    shape = {"user": "u", "assistant": "ua", "system": "s" if (role, "prompt") in learnt.gaps else ""}[role]
    try:
        return [_marked(chat, shape, prompt=False)[2][-1]] if shape else []
    except (NotTurned, TemplateError):
        return []


def _where(pair: Pair) -> str:
    before, role = pair
    if not before:
        return f"before a first {role} message"
    return f"after a last {before} message" if role == "prompt" else f"between a {before} and a {role} message"
