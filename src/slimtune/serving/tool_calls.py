"""How a chat template writes tool calls, and the calls in an answer.

A template is asked to write a call whose name and argument are marks. What stands around them is the format:

    <tool_call>\\n{"name": "MARK", "arguments": {"MARK": "MARK"}}\\n</tool_call>      Qwen, Hermes
    {"name": "MARK", "parameters": {"MARK": "MARK"}}                                Llama 3
    [TOOL_CALLS] [{"name": "MARK", "arguments": {"MARK": "MARK"}}]                  Mistral

A template whose calls are no JSON objects has no format here, and requests with tools are refused.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..core.data.assistant_mask import MARK
from ..core.data.chat_template import render_prompt
from ..core.data.messages import Messages, ToolCall, ToolFunction
from ..errors import DataError, ModelError
from ..extras.message_parsing import STRICT_JSON

MAX_CALLS = 32
"""Most calls in an answer; what follows stays unread."""
_BETWEEN = " \t\r\n,[]"
"""Characters between calls, and around a list of them."""


@dataclass(frozen=True)
class ToolCallFormat:
    """The text around a call, without special tokens and white space, and the keys of its JSON object."""

    opening: str
    closing: str
    name_key: str
    arguments_key: str

    def find_start(self, text: str) -> int:
        """Return how many characters at the beginning of an unfinished answer are no part of a call."""
        if not self.opening:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        if (found := text.find(self.opening)) >= 0:
            return found
        partial = (n for n in range(1, len(self.opening)) if text.endswith(self.opening[:n]))
        return len(text) - max(partial, default=0)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text before the calls of a whole answer, and the calls as OpenAI's API has them.

        An answer without a complete call is text as a whole.
        """
        calls: list[ToolCall] = []
        start, is_first = self.find_start(text), True
        position = start
        while len(calls) < MAX_CALLS:
            position = self._skip(text, position, "" if is_first else self.closing, self.opening)
            if not text.startswith("{", position):
                break
            try:
                value, position = STRICT_JSON.raw_decode(text, position)
                name, arguments = value.get(self.name_key), value.get(self.arguments_key)
                as_text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                break
            if not isinstance(name, str) or not isinstance(arguments, dict):
                break
            function: ToolFunction = {"name": name, "arguments": as_text}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            is_first = False
        return (text[:start].rstrip(), calls) if calls else (text, [])

    def _skip(self, text: str, position: int, *tags: str) -> int:
        """Return the position after white space, list brackets and these tags, as far as they are there."""
        for tag in (*filter(None, tags), ""):
            while text[position : position + 1] in (*_BETWEEN,) and not (tag and text.startswith(tag, position)):
                position += 1
            if text.startswith(tag, position):
                position += len(tag)
        return position


def detect_json_tool_call_format(tokenizer: Any) -> ToolCallFormat | None:
    """Return the format of calls of a tokenizer's chat template, None if it has none or another than JSON objects."""
    parameters = {"type": "object", "properties": {MARK: {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": MARK, "description": MARK, "parameters": parameters}}]
    function = {"name": MARK, "arguments": {MARK: MARK}}
    call = {"type": "function", "id": "call00001", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages: Messages = [{"role": "user", "content": "Hello"}, turn]
    try:
        prompt, text = (render_prompt(tokenizer, some, tools) for some in (messages[:1], messages))
    except (DataError, ModelError, TemplateError):
        return None
    if not text.startswith(prompt):
        return None
    start = text.find("{", len(prompt))
    while start >= 0:
        try:
            value, end = STRICT_JSON.raw_decode(text, start)
        except ValueError:
            value, end = {}, start
        name_key = next((k for k, v in value.items() if v == MARK), None)
        arguments_key = next((k for k, v in value.items() if v == {MARK: MARK}), None)
        if name_key and arguments_key:
            special = "|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)"
            after = re.split(special, text[end:], maxsplit=1)[0]
            # Answers are decoded without special tokens, and so is what stands before a call. A template may write more
            # there, such as an empty thought: the last word opens the call.
            ids = tokenizer(text[len(prompt) : start], add_special_tokens=False)["input_ids"]
            before = tokenizer.decode(ids, skip_special_tokens=True).rstrip(" \t\r\n[")
            opening = before.split()[-1] if before else ""
            return ToolCallFormat(opening, after.strip(_BETWEEN), name_key, arguments_key)
        start = text.find("{", start + 1)
    return None
