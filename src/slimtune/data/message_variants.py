"""Messages as a chat template takes them, with nothing of them left out.

Templates differ in how they want a call: arguments as an object or as JSON text, no content or an empty one. Each way
is tried until every call stands in the text; what no way brings into it is an error that names the message.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError
from .assistant_mask import MARK, Messages, with_arguments

_FIX = "remove {}, or give another template (data.chat_template)"


def spelled(
    messages: Messages, tools: list[dict[str, Any]] | None, render: Callable[[Messages], str]
) -> tuple[Messages, str]:
    """Return the messages as the template takes them, and their text.

    Raises:
        DataError: the template leaves out a message, a call or a tool.
        TemplateError: it refuses the messages, however they are spelled.
    """
    refused: TemplateError | TypeError | None = None
    lost: int | None = None
    for some in _spellings(messages):
        try:
            text = render(some)
            lost = _uncalled(some, render)
        except (TemplateError, TypeError) as error:  # `"…" + an object`, in a template
            refused = refused or error
            continue
        if lost is None:
            _require_whole(some, tools, text)
            return some, text
    if lost is not None:
        raise DataError(f"the chat template leaves out tool calls of messages[{lost}]", hint=_FIX.format("them"))
    raise refused if isinstance(refused, TemplateError) else TemplateError(str(refused))


def _spellings(messages: Messages) -> Iterator[Messages]:
    yield messages
    if not any(m.get("tool_calls") for m in messages):
        return
    silent = [_without_content(m) for m in messages]
    yield silent
    yield [_as_text(m) for m in messages]
    yield [_as_text(m) for m in silent]


def _without_content(message: dict[str, Any]) -> dict[str, Any]:
    blank = message.get("tool_calls") and not message.get("content")
    return {k: v for k, v in message.items() if k != "content"} if blank else message


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _uncalled(messages: Messages, render: Callable[[Messages], str]) -> int | None:
    """Return the number of a message some call of which the template does not write."""
    calling = [i for i, m in enumerate(messages) if m.get("tool_calls")]
    if not calling:
        return None
    marked = list(messages)
    for i in calling:
        calls = messages[i]["tool_calls"]
        marked[i] = {**messages[i], "tool_calls": [with_arguments(c, f"{MARK}{i}x{k}x") for k, c in enumerate(calls)]}
    text = render(marked)
    return next(
        (i for i in calling for k in range(len(messages[i]["tool_calls"])) if f"{MARK}{i}x{k}x" not in text), None
    )


def _require_whole(messages: Messages, tools: list[dict[str, Any]] | None, text: str) -> None:
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("tool_calls"):
            content = message.get("content", "").strip()
            if content not in text and not (message["role"] == "tool" and _holds(text, content)):
                got = f"the chat template leaves out messages[{i}] ({message['role']})"
                raise DataError(got, hint=_FIX.format("that message"))
    for tool in tools or ():
        if tool["function"]["name"] not in text:
            raise DataError(
                f"the chat template leaves out the tool {tool['function']['name']!r}", hint=_FIX.format("the tools")
            )


def _holds(text: str, word: str) -> bool:
    """Return whether a text holds a word: as it is, as JSON writes it, or as JSON that the template has spaced anew."""
    forms = [word, *(json.dumps(word, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
    if word.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            forms += [json.dumps(json.loads(word), ensure_ascii=ascii) for ascii in (False, True)]
    return any(form in text for form in forms)
