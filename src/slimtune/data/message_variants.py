"""Variants of the messages that different chat templates want, tried until the template leaves nothing out.

Templates differ in how they take a tool call: arguments as an object or as JSON text, with an empty content or without
one. Each variant is rendered until every call is in the text. What no variant shows is an error that names the message.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError
from .assistant_mask import MARK, replace_arguments
from .messages import Messages

_HINT = "remove {}, or use another chat template (data.chat_template)"


def render_complete(
    messages: Messages, tools: list[dict[str, Any]] | None, render: Callable[[Messages], str]
) -> tuple[Messages, str]:
    """Return the variant of the messages that the template renders completely, and its text.

    Raises:
        DataError: the template leaves out a message, a call or a tool.
        TemplateError: it refuses every variant.
    """
    refusal: TemplateError | TypeError | None = None
    incomplete: int | None = None
    for variant in _message_variants(messages):
        try:
            text = render(variant)
            incomplete = _find_missing_call(variant, render)
        except (TemplateError, TypeError) as error:  # TypeError: `"…" + an object` in a template
            refusal = refusal or error
            continue
        if incomplete is None:
            _check_complete(variant, tools, text)
            return variant, text
    if incomplete is not None:
        problem = f"the chat template leaves out tool calls of messages[{incomplete}]"
        raise DataError(problem, hint=_HINT.format("them"))
    raise refusal if isinstance(refusal, TemplateError) else TemplateError(str(refusal))


def _message_variants(messages: Messages) -> Iterator[Messages]:
    yield messages
    if any(m.get("tool_calls") for m in messages):
        no_content = [_drop_empty_content(m) for m in messages]
        yield no_content
        yield [_arguments_as_text(m) for m in messages]
        yield [_arguments_as_text(m) for m in no_content]


def _drop_empty_content(message: dict[str, Any]) -> dict[str, Any]:
    empty = message.get("tool_calls") and not message.get("content")
    return {k: v for k, v in message.items() if k != "content"} if empty else message


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _find_missing_call(messages: Messages, render: Callable[[Messages], str]) -> int | None:
    """Return the number of a message with a call that the template does not write."""
    marks: list[tuple[int, str]] = []
    marked = list(messages)
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            names = [f"{MARK}{i}x{k}x" for k in range(len(message["tool_calls"]))]
            calls = [replace_arguments(c, name) for c, name in zip(message["tool_calls"], names, strict=True)]
            marked[i] = {**message, "tool_calls": calls}
            marks += [(i, name) for name in names]
    if not marks:
        return None
    text = render(marked)
    return next((i for i, name in marks if name not in text), None)


def _check_complete(messages: Messages, tools: list[dict[str, Any]] | None, text: str) -> None:
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            continue  # `find_assistant_spans` checks its content
        content = message.get("content", "").strip()
        if content not in text and not (message["role"] == "tool" and _contains_json(text, content)):
            problem = f"the chat template leaves out messages[{i}] ({message['role']})"
            raise DataError(problem, hint=_HINT.format("that message"))
    for tool in tools or ():
        if (name := tool["function"]["name"]) not in text:
            raise DataError(f"the chat template leaves out the tool {name!r}", hint=_HINT.format("the tools"))


def _contains_json(text: str, content: str) -> bool:
    """Return whether a text contains a tool's result as a JSON string, or as JSON with other white space."""
    variants = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    if content.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            variants += [json.dumps(json.loads(content), ensure_ascii=ascii) for ascii in (False, True)]
    return any(variant in text for variant in variants)
