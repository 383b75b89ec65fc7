"""Infer what a Jinja chat template writes, by rendering it: which text stands before, between and after the messages.

    text = prefix("", r₁) content₁ suffix(r₁) prefix(r₁, r₂) content₂ suffix(r₂) … prefix(rₙ, "prompt")

Markers stand for the contents in conversations of a few shapes, and the text between the markers is read off. A chat
template has this form if each separator depends only on the two roles beside it; every deviation is reported by name.
Two more things are inferred: which whitespace is stripped around a content, and where the system prompt goes: where the
conversation has it, or into the last user message (as Mistral's templates do).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

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


class UnsupportedTemplate(Exception):
    """The chat template does not have the form described above; the message says where."""


class JinjaTemplate:
    """A tokenizer's chat template, rendered to text.

    Args:
        tokenizer: it has a chat template.
        cut_bos: remove the beginning-of-sequence token at the front, because the engine adds it.
    """

    def __init__(self, tokenizer: Any, cut_bos: bool) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        self.override = {"chat_template": _STRFTIME_MACRO + source} if "strftime_now" in source else {}
        self.bos = tokenizer.bos_token if cut_bos else None
        self.writes_bos: bool | None = None
        tokens = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self.special_tokens = [t for t in tokens if t.strip()]

    def render(self, messages: Messages, prompt: bool = True, **variables: Any) -> str:
        """Return the text of a conversation; dates appear as their format between `DATE_MARKERS`.

        Args:
            messages: with `role` and `content`.
            prompt: whether the text asks for the assistant's next message.
            variables: further variables of the template.

        Raises:
            TemplateError: the template refuses the messages.
            UnsupportedTemplate: the beginning-of-sequence token is written before some conversations only.
        """
        options = {"tokenize": False, "add_generation_prompt": prompt, **self.override, **variables}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        if not self.bos:
            return text
        has_bos = text.startswith(self.bos)
        if self.writes_bos is None:
            self.writes_bos = has_bos
        if self.writes_bos is not has_bos:
            raise UnsupportedTemplate(f"the chat template writes {self.bos} before some conversations only")
        return text.removeprefix(self.bos)


@dataclass
class ChatFormat:
    """The inferred form of a chat template.

    Args:
        prefixes: the text before a message, by the roles of its neighbour and of itself; for (role, "prompt"): what
            asks for an answer.
        suffixes: the text after a message, by its role, whatever follows.
        strips: characters stripped from the second message's content.
        system: "in order", "last" (inside the last user message), "refused" or "left out".
    """

    prefixes: dict[Neighbours, str] = field(default_factory=dict)
    suffixes: dict[str, str] = field(default_factory=dict)
    strips: dict[Neighbours, Strip] = field(default_factory=dict)
    system: str = "in order"

    def choices(self, role: str, after_system: bool = False) -> list[tuple[list[str], str, Strip]]:
        """Group the roles that can precede `role` by the prefix and the stripping they cause.

        Args:
            role: of the message.
            after_system: where the system prompt goes into the last user message: whether it stands in this one.

        Returns:
            preceding roles, prefix, stripping; the most common last, which is also used for neighbours that the chat
            template refuses.
        """
        groups: dict[tuple[str, Strip], list[str]] = {}
        for (before, this), prefix in self.prefixes.items():
            if this == role and (self.system != "last" or (before == "system") == after_system):
                groups.setdefault((prefix, self.strips[before, role]), []).append(before)
        ordered = sorted(groups.items(), key=lambda item: (len(item[1]), "assistant" in item[1], "user" in item[1]))
        return [(befores, prefix, strip) for (prefix, strip), befores in ordered]

    def prompt(self, role: str) -> str:
        """Return the text that asks for an answer after a message of this role."""
        return self.prefixes.get((role, "prompt"), self.prefixes["user", "prompt"])

    def render(self, messages: Messages) -> str:
        """Return the text of a conversation: exactly what the TEMPLATE written from this format gives.

        An answer at the end stays open: the model continues it.
        """
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        text, before = "", ""
        for message in messages:
            role, is_last = message["role"], message is messages[-1]
            if role == "system" and self.system != "in order":
                if self.system == "refused":
                    raise UnsupportedTemplate("the chat template refuses system messages")
                continue
            if role == "user" and is_last and self.system == "last" and system:
                text += self._render_message("system", before, system) + self.suffixes["system"]
                text += self._render_message("user", "system", message["content"], after_system=True)
            else:
                text += self._render_message(role, before, message["content"])
            if not (is_last and role == "assistant"):
                text += self.suffixes[role]
            if is_last and role != "assistant":
                text += self.prompt(role)
            before = role
        return text

    def _render_message(self, role: str, before: str, content: str, after_system: bool = False) -> str:
        choices = self.choices(role, after_system)
        _, prefix, (left, right) = next((c for c in choices if before in c[0]), choices[-1])
        stripped = content.lstrip(left) if left else content
        return prefix + (stripped.rstrip(right) if right else stripped)


def make_messages(shape: str, contents: Sequence[str]) -> Messages:
    """Return a conversation: roles by their letters in `shape`, contents in order."""
    return [{"role": ROLES[r], "content": c} for r, c in zip(shape, contents, strict=True)]


def infer_template(template: JinjaTemplate) -> ChatFormat:
    """Infer a chat template's form, and check it on conversations that it was not inferred from.

    Raises:
        UnsupportedTemplate: it has another form.
        TemplateError: it refuses a conversation that Ollama can send.
    """
    found = _Observations()
    for shape in REQUIRED_SHAPES:
        found.add(template, shape)
    found.system = _find_system_place(template)
    takes_system = found.system in ("in order", "last")
    if takes_system:
        for shape in REQUIRED_SHAPES:
            found.add(template, f"s{shape}")
    for shape in OPTIONAL_SHAPES if found.system == "in order" else ("au",):
        found.add_if_consistent(template, shape)
    chat = found.to_format(template)
    for shape in [*REQUIRED_SHAPES, *(f"s{s}" for s in REQUIRED_SHAPES if takes_system)]:
        for contents in _TEST_CONTENTS:
            messages = make_messages(shape, contents[: len(shape)])
            expected, text = template.render(messages), chat.render(messages)
            if text != expected:
                at = len(_common_prefix([expected, text]))
                here, there = (f"{t[max(0, at - 20) : at + 20]!r}" for t in (expected, text))
                raise UnsupportedTemplate(f"the chat template gives …{here}… where its inferred form gives …{there}…")
    return chat


def list_differences(template: JinjaTemplate, chat: ChatFormat) -> list[str]:
    """Return what the TEMPLATE does differently from the chat template, one sentence each."""

    def differs(shape: str, contents: Sequence[str], **variables: Any) -> bool:
        messages = make_messages(shape, contents)
        try:
            return template.render(messages, **variables) != chat.render(messages)
        except TemplateError:
            return False
        except UnsupportedTemplate:
            return True

    plain = _TEST_CONTENTS[0]
    thought = (plain[0], "<think>\nHm.\n</think>\n\nDespair.", plain[2])
    clock = {"name": "clock", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}}
    notes = []
    if chat.system == "refused":
        notes.append("the chat template refuses system messages; with this TEMPLATE Ollama reports an error for them")
    if chat.system == "left out":
        notes.append("the chat template ignores system messages, and so does the TEMPLATE")
    if differs("u", plain[:1], tools=[{"type": "function", "function": clock}]):
        notes.append("the TEMPLATE has no tools: Ollama will say that the model does not support them")
    if differs("uau", thought):
        notes.append(
            "the chat template removes thoughts (<think>…</think>) from earlier answers; the TEMPLATE does not"
        )
    if any(differs("u", plain[:1], enable_thinking=on) for on in (True, False)):
        notes.append("the TEMPLATE has no enable_thinking: it writes what the chat template writes without it")
    optional = [s for s in OPTIONAL_SHAPES if chat.system == "in order" or s == "au"]
    if unlike := [s for s in optional if differs(s, plain[: len(s)])]:
        orders = ", ".join(" ".join(ROLES[r] for r in s) for s in unlike)
        notes.append(f"conversations in this order of roles differ from the chat template: {orders}")
    if template.writes_bos is False:
        notes.append(f"Ollama writes {template.bos} before the text; the chat template does not")
    return notes


@dataclass
class _Observations:
    """Texts read off rendered conversations: `gaps` between two contents, suffix and prefix not yet separated."""

    gaps: dict[Neighbours, str] = field(default_factory=dict)
    strips: dict[Neighbours, Strip] = field(default_factory=dict)
    system: str = "in order"

    def add(self, template: JinjaTemplate, shape: str) -> None:
        """Add the gaps and the stripping of one shape.

        Raises:
            UnsupportedTemplate: they contradict what was seen before.
        """
        text, order, gaps = _render_markers(template, shape)
        if self.system != "last" and order != sorted(order):
            raise UnsupportedTemplate("the chat template changes the order of messages")
        pairs = list(itertools.pairwise(["", *(ROLES[shape[i]] for i in order), "prompt"]))
        for pair, gap in zip(pairs, gaps, strict=True):
            if self.gaps.setdefault(pair, gap) != gap:
                place = f"between {format_names(r or 'the beginning' for r in pair)}"
                raise UnsupportedTemplate(f"the text {place} varies: {self.gaps[pair]!r} and {gap!r}")
        for pair, i in zip(pairs, order, strict=False):
            padded = _render_markers(template, shape, padded=i)[0]
            strip = _find_strip(text, padded, _CONTENT_MARKER.format(i))
            role = ROLES[shape[i]]
            if strip is None:
                raise UnsupportedTemplate(f"the chat template changes {role} messages that have whitespace around them")
            if self.strips.setdefault(pair, strip) != strip:
                raise UnsupportedTemplate(f"whitespace around {role} messages is stripped in some places only")

    def add_if_consistent(self, template: JinjaTemplate, shape: str) -> None:
        """Add a rarer shape unless the template refuses it or it contradicts what was seen before."""
        trial = _Observations(dict(self.gaps), dict(self.strips), self.system)
        try:
            trial.add(template, shape)
        except (UnsupportedTemplate, TemplateError):
            return
        self.gaps, self.strips = trial.gaps, trial.strips

    def to_format(self, template: JinjaTemplate) -> ChatFormat:
        """Split each gap into the suffix of the message before it and the prefix of the message after it."""
        chat = ChatFormat(strips=self.strips, system=self.system)
        for role in ROLES.values():
            ends = [gap for (before, _), gap in self.gaps.items() if before == role]
            if ends:
                chat.suffixes[role] = _common_suffix([*ends, *self._ends(template, role)], template.special_tokens)
        for (before, role), gap in self.gaps.items():
            chat.prefixes[before, role] = gap[len(chat.suffixes.get(before, "")) :]
        return chat

    def _ends(self, template: JinjaTemplate, role: str) -> list[str]:
        """Return the end of a text that asks for no answer: some templates close a message only there."""
        shape = {"user": "u", "assistant": "ua", "system": "s" if (role, "prompt") in self.gaps else ""}[role]
        try:
            return [_render_markers(template, shape, prompt=False)[2][-1]] if shape else []
        except (UnsupportedTemplate, TemplateError):
            return []


def _render_markers(
    template: JinjaTemplate, shape: str, prompt: bool = True, padded: int | None = None
) -> tuple[str, list[int], list[str]]:
    """Render a shape with markers as contents; the content at index `padded` gets whitespace around it.

    Returns:
        the text, the messages' indices in the order of the text, and the texts around the markers.
    """
    markers = [_CONTENT_MARKER.format(i) for i in range(len(shape))]
    contents = [f"{_PADDING[0]}{m}{_PADDING[1]}" if i == padded else m for i, m in enumerate(markers)]
    text = template.render(make_messages(shape, contents), prompt)
    for role, marker in zip(shape, markers, strict=True):
        if (count := text.count(marker)) != 1:
            how = "more than once" if count else "not at all, or not as plain text"
            raise UnsupportedTemplate(f"the chat template writes {ROLES[role]} messages {how}")
    order = sorted(range(len(shape)), key=lambda i: text.index(markers[i]))
    gaps, at = [], 0
    for i in order:
        gaps.append(text[at : text.index(markers[i])])
        at = text.index(markers[i]) + len(markers[i])
    return text, order, [*gaps, text[at:]]


def _find_system_place(template: JinjaTemplate) -> str:
    try:
        _render_markers(template, "su")
        order = _render_markers(template, "suau")[1]
    except TemplateError:
        return "refused"
    except UnsupportedTemplate:
        return "left out"
    return "last" if order == [1, 2, 0, 3] else "in order"


def _find_strip(text: str, padded: str, marker: str) -> Strip | None:
    for left, right in itertools.product(_STRIPPED_CHARACTERS, repeat=2):
        before = _PADDING[0].lstrip(left) if left else _PADDING[0]
        after = _PADDING[1].rstrip(right) if right else _PADDING[1]
        if text.replace(marker, before + marker + after) == padded:
            return left, right
    return None


def _common_suffix(gaps: list[str], special_tokens: Sequence[str]) -> str:
    """Return the longest text that all gaps begin with and that does not end inside a special token."""
    common = _common_prefix(gaps)
    for size in range(len(common), 0, -1):
        if not any(t in gap[max(0, size - len(t) + 1) : size + len(t) - 1] for gap in gaps for t in special_tokens):
            return common[:size]
    return ""


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all other texts share what these two share
    return next((first[:i] for i, c in enumerate(first) if last[i : i + 1] != c), first)
