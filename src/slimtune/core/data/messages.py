"""The messages of one row, in the form that every chat template takes, and what a template keeps of them.

    {"role": "system" | "developer" | "user", "content": str}
    {"role": "assistant", "content": str, "tool_calls": [{"type": "function", "function": {"name", "arguments"}}]}
    {"role": "tool", "content": str, "name": str, "tool_call_id": str}

Tool arguments are an object. An assistant's message may have a key of `REASONING_KEYS`, and a role may be "developer",
if the chat template reads them (`reject_unrendered_reasoning`).
"""

import re
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

Message = dict[str, Any]
"""A chat message as chat templates read it; those that were validated have the keys above, and no others."""
Messages = list[Message]
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of an assistant's message with what it thinks before it answers; a chat template reads one of them, or none."""


class ToolFunction(TypedDict):
    """The function that a tool call names."""

    name: str
    arguments: Any
    """An object, or its JSON text."""


class ToolCall(TypedDict):
    """A tool call of an assistant's message."""

    type: str
    function: ToolFunction
    id: NotRequired[str]


class RowError(ValueError):
    """A row is invalid: the cause, for people, the kind of error as a `code` in kebab case, and what to do about it."""

    def __init__(self, cause: str, code: str, hint: str = "") -> None:
        super().__init__(cause)
        self.code, self.hint = code, hint


def reject_unrendered_reasoning(messages: Messages, template: str) -> None:
    """Raise RowError for the role "developer" or a key of `REASONING_KEYS` that a chat template does not read."""
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if message["role"] == "developer" and not re.search(r"\bdeveloper\b", template):
            cause = f"{name} has the role 'developer', which the chat template does not know"
            raise RowError(cause, "template-leaves-out", "call it 'system'")
        for key in REASONING_KEYS:
            if key not in message or re.search(rf"\b{key}\b", template):
                continue
            other = next((k for k in REASONING_KEYS if re.search(rf"\b{k}\b", template)), None)
            instead = f"rename it to {other!r}" if other else "put it into the content, such as <think>…</think>"
            hint = f"{instead}, or leave it out: --ignore-columns messages.{key} (data.ignore_columns)"
            raise RowError(f"{name} has {key!r}, which the chat template does not read", "template-leaves-out", hint)


def find_thinking_and_source(message: Message) -> tuple[str, str]:
    """Return what an assistant's message thinks before it answers, and where it says so; "", "" if it does not think.

    It is the text of a key of `REASONING_KEYS`, or what is before `</think>` in the content. Templates that split a
    content do it there, whether or not it begins with `<think>`: in some the prompt ends with that tag.
    """
    if message["role"] == "assistant":
        for key in REASONING_KEYS:
            if text := message.get(key, "").strip():
                return text, repr(key)
        before, tag, _ = message.get("content", "").partition("</think>")
        if tag and (text := before.rpartition("<think>")[2].strip()):
            return text, "'<think>…</think>'"
    return "", ""


def count_thinking_turns_by_use(
    messages: Messages, rendered: str, turn_spans: list[tuple[int, int]], learned: Sequence[bool] | None
) -> tuple[int, int, int]:
    """Return how many turns of a rendered conversation think: learned with it, kept but not learned, left out.

    Args:
        messages: the conversation.
        rendered: its text by the chat template.
        turn_spans: the characters of each assistant turn; if the template has other marks, the whole text is searched.
        learned: for each message whether it is learned; None: every assistant turn is.

    Raises:
        RowError: the template leaves out what a learned turn thinks, so that the model would learn not to think.
    """
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    places = turn_spans if len(turn_spans) == len(assistant) else [(0, len(rendered))] * len(assistant)
    counts = [0, 0, 0]
    for i, (start, end) in zip(assistant, places, strict=True):
        text, where = find_thinking_and_source(messages[i])
        is_learned = learned is None or learned[i]
        if not text:
            continue
        kept = text in rendered[start:end]
        counts[2 if not kept else 0 if is_learned else 1] += 1
        if is_learned and not kept:
            hint = (
                "make a row of its own that ends with this turn, or learn last turns alone: --train-on last_assistant"
            )
            if i == assistant[-1]:
                hint = "give a chat template that keeps it: --chat-template FILE.jinja (data.chat_template)"
            cause = f"the chat template leaves out {where} of messages[{i}], and the model would learn not to think"
            raise RowError(cause, "thinking-left-out", hint)
    return counts[0], counts[1], counts[2]
