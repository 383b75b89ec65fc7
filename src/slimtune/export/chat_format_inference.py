"""Infer what a Jinja chat template writes, by rendering it: which text stands before, between and after the messages.

    text = prefix("", r₁) content₁ suffix(r₁) prefix(r₁, r₂) content₂ suffix(r₂) … prefix(rₙ, "prompt")

Markers stand for the contents in conversations of a few shapes, and the text between the markers is read off. A chat
template has this form if each separator depends only on the two roles beside it; every deviation is reported by name.
Two more things are inferred: which whitespace is stripped around a content, and where the system prompt goes: where the
conversation has it, or into the last user message (as Mistral's templates do).
"""

import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..core.foundation.chat_rendering import render_chat_template
from ..core.foundation.sequences import count_common_prefix, find_shared_prefix
from ..errors import format_names

ROLES = {"s": "system", "u": "user", "a": "assistant"}
REQUIRED_SHAPES = ("u", "uau", "uauau")
"""Roles of conversations that a template must render: what Ollama sends ends with the user's message."""
OPTIONAL_SHAPES = ("s", "sau", "au", "usu", "uasu", "uas")
"""Rarer conversations, which many templates refuse."""
DATE_MARKERS = ("\ue010", "\ue011")
"""Enclose the strftime format of a date, in place of the date."""
_STRFTIME_MACRO = (
    f"{{% macro strftime_now(style) %}}{{{{ '{DATE_MARKERS[0]}' + style + '{DATE_MARKERS[1]}' }}}}"
    "{% endmacro %}{{ '' }}"
)
_CONTENT_MARKER = "\ue000{}\ue001"
_PADDING = ("\n\n \t\r", "\r \t\n\n")
_STRIPPED_CHARACTERS = ("", "\n", " \n\t\r\v\f")  # the last: the ASCII whitespace that Python's strip() removes
_TEST_CONTENTS = (
    ("Define patience.", "A minor form of despair.", "And hope?", "Desire and expectation.", "Go on.", "No.", "Why?"),
    (" Größe\n", "\n嘘 🙂\t", "\r\n a\n\nb ", "  x", "y\n", "\tz ", " w "),
    ('{{ .Role }} """', "{% if x %}{{- y }}", "<b>user</b> system:", "[x] \\n %s", "assistant", "'{'", "}} {{ end }}"),
)

Messages = list[dict[str, str]]
Neighbours = tuple[str, str]
"""Roles of two neighbouring messages; "" before the first message, "prompt" after the last."""
Strip = tuple[str, str]
"""Characters stripped from the left and from the right of a content."""


class UnsupportedChatTemplate(Exception):
    """The chat template does not have the form described above; the message says where."""


class JinjaChatTemplate:
    """A tokenizer's chat template, rendered to text; `cut_bos` where the engine adds the first token."""

    def __init__(self, tokenizer: Any, cut_bos: bool) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        self.source = _STRFTIME_MACRO + source if "strftime_now" in source else source
        self.bos = tokenizer.bos_token if cut_bos else None
        self.writes_bos: bool | None = None
        tokens = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self.special_tokens = [t for t in tokens if t.strip()]

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the text of a conversation; dates appear as their format between `DATE_MARKERS`.

        With `add_generation_prompt` the text asks for the next answer. TemplateError: the template refuses.
        """
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **variables}
        text = render_chat_template(self.tokenizer, messages, template=self.source, **options)
        if not self.bos:
            return text
        has_bos = text.startswith(self.bos)
        if self.writes_bos is None:
            self.writes_bos = has_bos
        if self.writes_bos is not has_bos:
            raise UnsupportedChatTemplate(f"the chat template writes {self.bos} before some conversations only")
        return text.removeprefix(self.bos)


@dataclass(frozen=True)
class InferredChatFormat:
    """The inferred form of a chat template."""

    prefixes_by_role_pair: dict[Neighbours, str]  # the text before a message; (role, "prompt"): asks for an answer
    suffixes: dict[str, str]  # the text after a message, by its role, whatever follows
    stripped_characters_by_role_pair: dict[Neighbours, Strip]  # what is stripped from the second message's content
    system_placement: str  # "in order", "last" (inside the last user message), "refused" or "left out"

    def choices(self, role: str, after_system: bool = False) -> list[tuple[list[str], str, Strip]]:
        """Group the roles that can precede `role` by the prefix and the stripping they cause, the largest group last.

        That one is also used for neighbours that the chat template refuses. Where the system prompt goes into the last
        user message, `after_system` tells whether it stands in this one.
        """
        groups: dict[tuple[str, Strip], list[str]] = {}
        for (before, this), prefix in self.prefixes_by_role_pair.items():
            if this == role and (self.system_placement != "last" or (before == "system") == after_system):
                groups.setdefault((prefix, self.stripped_characters_by_role_pair[before, role]), []).append(before)
        ordered = sorted(groups.items(), key=lambda item: (len(item[1]), "assistant" in item[1], "user" in item[1]))
        return [(befores, prefix, strip) for (prefix, strip), befores in ordered]

    def generation_prompt(self, role: str) -> str:
        """Return the text that asks for an answer after a message of this role."""
        return self.prefixes_by_role_pair.get((role, "prompt"), self.prefixes_by_role_pair["user", "prompt"])

    def render(self, messages: Messages) -> str:
        """Return the text of a conversation: exactly what the TEMPLATE written from this format gives.

        An answer at the end stays open: the model continues it.
        """
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        text, before = "", ""
        for message in messages:
            role, is_last = message["role"], message is messages[-1]
            if role == "system" and self.system_placement == "refused":
                raise UnsupportedChatTemplate("the chat template refuses system messages")
            if role == "system" and self.system_placement != "in order":
                continue
            with_system = role == "user" and is_last and self.system_placement == "last" and bool(system)
            if with_system:
                text += self._render_message("system", before, system) + self.suffixes["system"]
            text += self._render_message(role, "system" if with_system else before, message["content"], with_system)
            text += "" if is_last and role == "assistant" else self.suffixes[role]
            text += self.generation_prompt(role) if is_last and role != "assistant" else ""
            before = role
        return text

    def _render_message(self, role: str, before: str, content: str, after_system: bool = False) -> str:
        choices = self.choices(role, after_system)
        _, prefix, (left, right) = next((c for c in choices if before in c[0]), choices[-1])
        stripped = content.lstrip(left) if left else content
        return prefix + (stripped.rstrip(right) if right else stripped)


def make_probe_messages(shape: str, contents: Sequence[str]) -> Messages:
    """Return a conversation: roles by their letters in `shape`, contents in order."""
    return [{"role": ROLES[r], "content": c} for r, c in zip(shape, contents, strict=True)]


def infer_chat_format(template: JinjaChatTemplate) -> InferredChatFormat:
    """Infer a chat template's form, and check it on conversations that it was not inferred from.

    Raises:
        UnsupportedChatTemplate: it has another form.
        TemplateError: it refuses a conversation that Ollama can send.
    """
    gaps: dict[Neighbours, str] = {}  # texts between two contents: suffix and prefix together
    strips: dict[Neighbours, Strip] = {}
    for shape in REQUIRED_SHAPES:
        _observe(template, shape, gaps, strips)
    system = _find_system_place(template)
    with_system = [f"s{shape}" for shape in REQUIRED_SHAPES] if system in ("in order", "last") else []
    for shape in with_system:
        _observe(template, shape, gaps, strips, in_order=system == "in order")
    for shape in OPTIONAL_SHAPES if system == "in order" else ("au",):
        trial = dict(gaps), dict(strips)
        with suppress(UnsupportedChatTemplate, TemplateError):
            _observe(template, shape, *trial)
            gaps, strips = trial
    suffixes: dict[str, str] = {}
    for role, shape in (("system", "s"), ("user", "u"), ("assistant", "ua")):
        ends = [gap for (before, _), gap in gaps.items() if before == role]
        if shape != "s" or ("system", "prompt") in gaps:
            with suppress(
                UnsupportedChatTemplate, TemplateError
            ):  # some templates close a message only at the very end
                ends.append(_render_markers(template, shape, prompt=False)[2][-1])
        if ends:
            suffixes[role] = _common_beginning(ends, template.special_tokens)
    prefixes = {pair: gap[len(suffixes.get(pair[0], "")) :] for pair, gap in gaps.items()}
    chat = InferredChatFormat(prefixes, suffixes, strips, system)
    for shape, contents in itertools.product([*REQUIRED_SHAPES, *with_system], _TEST_CONTENTS):
        messages = make_probe_messages(shape, contents[: len(shape)])
        expected, text = template.render(messages), chat.render(messages)
        if expected != text:
            at = count_common_prefix(expected, text)
            here, there = (f"{t[max(0, at - 20) : at + 20]!r}" for t in (expected, text))
            raise UnsupportedChatTemplate(f"the chat template gives …{here}… where its inferred form gives …{there}…")
    return chat


def describe_ollama_differences(jinja_template: JinjaChatTemplate, inferred_format: InferredChatFormat) -> list[str]:
    """Return what the TEMPLATE does differently from the chat template, one sentence each."""

    def differs(shape: str, contents: Sequence[str], **variables: Any) -> bool:
        messages = make_probe_messages(shape, contents)
        try:
            return jinja_template.render(messages, **variables) != inferred_format.render(messages)
        except TemplateError:
            return False
        except UnsupportedChatTemplate:
            return True

    plain = _TEST_CONTENTS[0]
    thought = (plain[0], "<think>\nHm.\n</think>\n\nDespair.", plain[2])
    clock = {"name": "clock", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": clock}]
    place, has_bos = inferred_format.system_placement, jinja_template.writes_bos
    optional = [s for s in OPTIONAL_SHAPES if place == "in order" or s == "au"]
    unlike = ", ".join(" ".join(ROLES[r] for r in s) for s in optional if differs(s, plain[: len(s)]))
    has_switch = any(differs("u", plain[:1], enable_thinking=on) for on in (True, False))
    notes = {
        "the chat template refuses system messages; with this TEMPLATE Ollama reports an error": place == "refused",
        "the chat template ignores system messages, and so does the TEMPLATE": place == "left out",
        "the TEMPLATE has no tools: Ollama says that the model supports none": differs("u", plain[:1], tools=tools),
        "only the chat template removes thoughts (<think>…</think>) from earlier answers": differs("uau", thought),
        "the TEMPLATE has no enable_thinking: it writes what the chat template writes without it": has_switch,
        f"conversations in this order of roles differ from the chat template: {unlike}": bool(unlike),
        f"Ollama writes {jinja_template.bos} before the text; the chat template does not": has_bos is False,
    }
    return [note for note, holds in notes.items() if holds]


def _observe(
    template: JinjaChatTemplate,
    shape: str,
    gaps: dict[Neighbours, str],
    strips: dict[Neighbours, Strip],
    in_order: bool = True,
) -> None:
    """Add the gaps and stripping of a conversation; UnsupportedChatTemplate if they contradict those of another."""
    text, order, texts = _render_markers(template, shape)
    if in_order and order != sorted(order):
        raise UnsupportedChatTemplate("the chat template changes the order of messages")
    pairs = list(itertools.pairwise(["", *(ROLES[shape[i]] for i in order), "prompt"]))
    for pair, gap in zip(pairs, texts, strict=True):
        if gaps.setdefault(pair, gap) != gap:
            place = f"between {format_names(r or 'the beginning' for r in pair)}"
            raise UnsupportedChatTemplate(f"the text {place} varies: {gaps[pair]!r} and {gap!r}")
    for pair, i in zip(pairs, order, strict=False):
        role, strip = ROLES[shape[i]], _find_strip(text, _render_markers(template, shape, padded=i)[0], i)
        if strip is None:
            raise UnsupportedChatTemplate(f"the chat template changes {role} messages that have whitespace around them")
        if strips.setdefault(pair, strip) != strip:
            raise UnsupportedChatTemplate(f"whitespace around {role} messages is stripped in some places only")


def _render_markers(
    template: JinjaChatTemplate, shape: str, prompt: bool = True, padded: int | None = None
) -> tuple[str, list[int], list[str]]:
    """Render a shape with markers as contents; the content at index `padded` gets whitespace around it.

    Returns the text, the messages' indices in the order of the text, and the texts around the markers.
    """
    markers = [_CONTENT_MARKER.format(i) for i in range(len(shape))]
    contents = [f"{_PADDING[0]}{m}{_PADDING[1]}" if i == padded else m for i, m in enumerate(markers)]
    text = template.render(make_probe_messages(shape, contents), prompt)
    for role, marker in zip(shape, markers, strict=True):
        if (count := text.count(marker)) != 1:
            how = "more than once" if count else "not at all, or not as plain text"
            raise UnsupportedChatTemplate(f"the chat template writes {ROLES[role]} messages {how}")
    order = sorted(range(len(shape)), key=lambda i: text.index(markers[i]))
    return text, order, re.split("|".join(markers), text)


def _find_system_place(template: JinjaChatTemplate) -> str:
    try:
        _render_markers(template, "su")
        order = _render_markers(template, "suau")[1]
    except TemplateError:
        return "refused"
    except UnsupportedChatTemplate:
        return "left out"
    return "last" if order == [1, 2, 0, 3] else "in order"


def _find_strip(text: str, padded: str, number: int) -> Strip | None:
    """Return what was stripped from a padded content, by comparing with the text without padding."""
    marker = _CONTENT_MARKER.format(number)
    for left, right in itertools.product(_STRIPPED_CHARACTERS, repeat=2):
        before = _PADDING[0].lstrip(left) if left else _PADDING[0]
        after = _PADDING[1].rstrip(right) if right else _PADDING[1]
        if text.replace(marker, before + marker + after) == padded:
            return left, right
    return None


def _common_beginning(texts: list[str], special_tokens: Sequence[str]) -> str:
    """Return the longest text that all begin with and that does not end inside a special token."""
    spans = [m.span() for text in texts for t in special_tokens for m in re.finditer(re.escape(t), text)]
    common = find_shared_prefix(texts)
    while any(start < len(common) < end for start, end in spans):
        common = common[:-1]
    return common
