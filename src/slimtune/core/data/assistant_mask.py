"""The character spans of the assistant's turns in a rendered conversation, for any chat template.

A template is a program, so the spans are derived from its own renderings:

    full    = render(messages)
    before  = render(messages[:i], add_generation_prompt=True)     the model's input when turn i begins
    marked  = render(messages with the content of turn i replaced by MARK) = head + MARK + tail

Turn i begins where `before` ends, if `full` continues with the content there. Otherwise the template has no generation
prompt, writes something before the content, or changes earlier turns when later ones follow. Then `head` and `tail`
give the position of the content, and the text between the previous message and this one, in both renderings, gives the
part that belongs to the prompt. The turn ends with the first special token after the content.

Tool calls are part of the turn. The last call ends where the rendering with one more call differs; from there the turn
ends like any other.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from ...errors import DataError, ModelError
from ..foundation.sequences import count_common_prefix
from .messages import Messages, ToolCall

Render = Callable[[Messages, bool], str]
Span = tuple[int, int]

MARK, MARK_BEFORE = "qZ7slimtuneX1", "qZ7slimtuneX2"
TAIL_CHARACTERS = 40
"""Characters at the end of a tool call by which it is found in another rendering."""


def find_assistant_spans(text: str, messages: Messages, render: Render, special_tokens: re.Pattern[str]) -> list[Span]:
    """Return the `[start, end)` characters of `text` that the model must produce, one span per assistant turn.

    `text` are the rendered messages, `render(messages, add_generation_prompt)` may raise `jinja2.TemplateError`. Raise
    ModelError if the template does not show where a turn is, DataError if it writes a tool's result inside a turn.
    """
    finder = _SpanFinder(text, messages, render, special_tokens)
    spans = [finder.find_turn(i) for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i, message in enumerate(messages):
        if message["role"] == "tool":  # some templates move the content of a call after its result
            marked = finder.render(_replace_content(messages, i, MARK + message["content"]))
            at = count_common_prefix(text, marked) if marked is not None and MARK in marked else 0
            if any(start < at < end for start, end in spans):
                raise _move_error(f"the chat template writes messages[{i}] (tool) within the turn that called it")
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        raise _unclear_error("its turns overlap")
    return spans


def replace_tool_call_arguments(call: ToolCall, arguments: Any) -> ToolCall:
    """Return a tool call with other arguments, as JSON text if its own are."""
    if isinstance(call["function"]["arguments"], str):
        arguments = json.dumps(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


class _SpanFinder:
    """Finds the spans of one conversation; see the module."""

    def __init__(self, full: str, messages: Messages, render: Render, special_tokens: re.Pattern[str]) -> None:
        self.full, self.messages, self._render, self.special_tokens = full, messages, render, special_tokens

    def render(self, messages: Messages, generation_prompt: bool = False) -> str | None:
        """Render messages; None if the template refuses them, as many do for a part of a conversation."""
        try:
            return self._render(messages, generation_prompt) if messages else None
        except TemplateError:
            return None

    def find_turn(self, i: int) -> Span:
        """Return the span of assistant message i."""
        full, messages = self.full, self.messages
        before = self.render(messages[:i], True)
        if messages[i].get("tool_calls"):
            return self._find_calling_turn(i, before)
        content, with_mark = messages[i]["content"].strip(), _replace_content(messages, i, MARK)
        if before is not None and full.startswith(before):
            body = len(full) - len(full[len(before) :].lstrip())
            if full.startswith(content, body):
                return len(before), self._find_end(with_mark, i, MARK, body + len(content))
        marked = self.render(with_mark)
        if marked is None or marked.count(MARK) != 1:
            raise _unclear_error(f"it does not render the content of messages[{i}] exactly once")
        head, tail = marked.split(MARK)
        if not full.endswith(tail):
            raise _unclear_error(f"the text after messages[{i}] changes with its content")
        body_end = len(full) - len(tail)
        start = self._find_start(i, head, before)
        if not start < body_end:
            raise _unclear_error(f"messages[{i}] is rendered as nothing")
        return start, self._find_end(with_mark, i, MARK, body_end)

    def _find_calling_turn(self, i: int, before: str | None) -> Span:
        full, messages = self.full, self.messages
        marked = self.render(_replace_content(messages, i, MARK))
        if marked is not None and marked.count(MARK) == 1:
            start = self._find_start(i, marked.split(MARK)[0], before)
        elif before is not None and full.startswith(before) and before != self.render(messages[:i]):
            start = len(before)
        else:
            raise _unclear_error(f"it does not show where the calls of messages[{i}] begin")
        body_end = self._find_calls_end(i, start)
        end = self._find_end(messages, i, full[start:body_end][-TAIL_CHARACTERS:], body_end)
        if messages[i].get("content", "").strip() not in full[start:end]:
            raise _move_error(f"the chat template writes the content of messages[{i}] apart from its calls")
        return start, end

    def _find_calls_end(self, i: int, start: int) -> int:
        full, calls = self.full, self.messages[i]["tool_calls"]

        def render_calls(calls: list[Any]) -> str | None:
            return self.render([{**m, "tool_calls": calls} if j == i else m for j, m in enumerate(self.messages)])

        # The other call has the same name and id: some templates repeat the name above the result, and some want ids of
        # nine characters.
        other = replace_tool_call_arguments(calls[-1], {MARK: MARK})
        longer = render_calls([*calls, other])
        if longer is not None and MARK in longer:
            at = count_common_prefix(full, longer)
        else:  # the template takes one call at a time: what follows the arguments is the end of the turn
            changed = render_calls([*calls[:-1], other])
            if changed is None or MARK not in changed:
                raise _unclear_error(f"it does not show where the calls of messages[{i}] end")
            at = max(len(full) - count_common_prefix(full[::-1], changed[::-1]), start)
        if at < start:
            raise _unclear_error(f"the text before the calls of messages[{i}] changes with them")
        # If both renderings continue with special tokens, these may share their first characters.
        tokens = self.special_tokens.finditer(full, start)
        return next((found.start() for found in tokens if found.start() < at < found.end()), at)

    def _find_start(self, i: int, head: str, before: str | None) -> int:
        """Return where turn i begins; its content begins after `head`."""
        has_prompt = before is not None and before != self.render(self.messages[:i])
        if has_prompt and before is not None and self.full.startswith(before):
            return len(before)  # the model must produce what the template writes between its prompt and the content
        if not self.full.startswith(head):
            raise _unclear_error(f"the text before messages[{i}] changes with its content")
        both = prompt = None
        if i:
            marked = _replace_content(self.messages, i - 1, MARK_BEFORE)
            both, prompt = self.render(_replace_content(marked, i, MARK)), self.render(marked[:i], True)
        if both is None or prompt is None or MARK_BEFORE not in both or MARK_BEFORE not in prompt:
            return len(head)
        between, header = both.split(MARK)[0].rsplit(MARK_BEFORE)[-1], prompt.rsplit(MARK_BEFORE)[-1]
        produced = between[len(header) :] if between.startswith(header) else ""
        return len(head) - len(produced) if has_prompt or produced.isspace() else len(head)

    def _find_end(self, messages: Messages, i: int, last_words: str, body_end: int) -> int:
        """Return where turn i ends, whose content or calls end at `body_end` of the full text.

        Turn i of `messages` ends with `last_words` instead, so that it can be found in their other renderings.
        """
        after = self.full[body_end:].lstrip()
        at = len(self.full) - len(after)
        closing = after
        if i + 1 < len(messages):
            # Only what also follows when the turn is the last one belongs to it; the rest is the next turn's header.
            alone = self._text_after(last_words, messages[: i + 1])
            alone = after if alone is None else alone
            closing = after[: count_common_prefix(after, alone)]
            token = self.special_tokens.search(after)
            if token and token.end() > len(closing):
                # Some templates end the last turn with one token and earlier turns with another, before a header.
                next_header = self.special_tokens.match(after[token.end() :].lstrip())
                if token.start() == 0 and self.special_tokens.match(alone) and next_header:
                    return at + token.end()
                closing = closing[: token.start()]
        if found := self.special_tokens.search(closing):
            return at + self._extend_end(closing, found.end(), messages, i, last_words)
        line = closing.split("\n", 1)[0].rstrip()  # the end is plain text for this tokenizer
        return at + len(line) if line else body_end

    def _extend_end(self, closing: str, end: int, messages: Messages, i: int, last_words: str) -> int:
        """Return the end of the special tokens that close a turn one after another; calls may have lines between."""
        calls = messages[i].get("tool_calls")

        def next_token() -> re.Match[str] | None:
            blanks = len(closing[end:]) - len(closing[end:].lstrip()) if calls else 0
            return self.special_tokens.match(closing, end + blanks)

        if next_token() and i + 1 == len(messages):
            # Some templates also close the whole conversation. What stands there before another message is the turn's.
            following = {"role": "tool", "name": calls[-1]["function"]["name"]} if calls else {"role": "user"}
            if calls and "id" in calls[-1]:
                following["tool_call_id"] = calls[-1]["id"]
            continued = self._text_after(last_words, [*messages, {**following, "content": MARK_BEFORE}])
            closing = closing[: max(end, count_common_prefix(closing, continued or ""))]
        while found := next_token():
            end = found.end()
        return end

    def _text_after(self, last_words: str, messages: Messages) -> str | None:
        text = self.render(messages)
        return text.rpartition(last_words)[2].lstrip() if text is not None and last_words in text else None


def _replace_content(messages: Messages, i: int, content: str) -> Messages:
    return [{**m, "content": content} if j == i else m for j, m in enumerate(messages)]


def _move_error(problem: str) -> DataError:
    hint = "leave out the content beside the call, or use another chat template (data.chat_template)"
    return DataError(problem, hint=hint)


def _unclear_error(reason: str) -> ModelError:
    return ModelError(
        f"the chat template does not show which tokens the assistant produces: {reason}",
        expected="a template that renders the content of each message once, in order",
        hint="mark the assistant's part with {% generation %} … {% endgeneration %} in data.chat_template",
    )
