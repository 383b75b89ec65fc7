"""Where the assistant speaks in a rendered conversation, as spans of characters, for any chat template.

A template is a program, so nothing is assumed of it but what its own renderings show:

    full    = render(messages)
    before  = render(messages[:i], add_generation_prompt=True)     what the model is given when it is its turn
    marked  = render(messages with turn i's content replaced by a mark) = head + mark + tail

Turn i begins where `before` ends, if `full` continues it with the content. Where it does not (the template has no
generation prompt, writes something before the content, or rewrites earlier turns when later ones are there), `head` and
`tail` give the content, and the text between the previous message and this one, in both renderings, gives the part
of it that was the prompt's. The turn ends with the first special token after the content.

Tool calls are the assistant's words, too. Where the last of them ends is where the rendering with one more call goes on
differently; from there the turn ends as any other.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from slimtune.errors import ModelError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
Span = tuple[int, int]

MARK, MARK_BEFORE = "qZ7slimtuneX1", "qZ7slimtuneX2"
_TAIL = 40
"""Characters of a turn by which its end is found in another rendering."""


def assistant_spans(full: str, messages: Messages, render: Render, ends: re.Pattern[str]) -> list[Span]:
    """Return the `[start, end)` characters of `full` which the model has to say, one span per assistant turn.

    Args:
        full: the rendered conversation.
        messages: its messages.
        render: `render(messages, add_generation_prompt)`; may raise `jinja2.TemplateError`.
        ends: matches any special token of the tokenizer.

    Raises:
        ModelError: the template does not show where a turn lies.
    """
    spans = [_turn(full, messages, i, render, ends) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        raise _lost("its turns overlap")
    return spans


def _turn(full: str, messages: Messages, i: int, render: Render, ends: re.Pattern[str]) -> Span:
    if messages[i].get("tool_calls"):
        return _calling(full, messages, i, render, ends)
    before = _tried(render, messages[:i], True)
    content = messages[i]["content"].strip()
    if before is not None and full.startswith(before):
        body = len(before) + len(full[len(before) :]) - len(full[len(before) :].lstrip())
        if full.startswith(content, body):
            return len(before), _end(full, messages, i, body + len(content), _last(messages, i, render), ends)
    marked = _tried(render, _with(messages, i, MARK), False)
    if marked is None or marked.count(MARK) != 1:
        raise _lost(f"it does not render the content of messages[{i}] exactly once")
    head, tail = marked.split(MARK)
    if not full.endswith(tail):
        raise _lost(f"the text after messages[{i}] changes with its content")
    body_end = len(full) - len(tail)
    start = _start(full, head, messages, i, before, render)
    if not start < body_end:
        raise _lost(f"messages[{i}] leaves nothing to say")
    return start, _end(full, messages, i, body_end, _last(messages, i, render), ends)


def _calling(full: str, messages: Messages, i: int, render: Render, ends: re.Pattern[str]) -> Span:
    """Return the span of a turn that calls functions."""
    before = _tried(render, messages[:i], True)
    marked = _tried(render, _with(messages, i, MARK), False)
    if marked is not None and marked.count(MARK) == 1:
        start = _start(full, marked.split(MARK)[0], messages, i, before, render)
    elif before is not None and full.startswith(before) and before != _tried(render, messages[:i], False):
        start = len(before)
    else:
        raise _lost(f"it does not show where the calls of messages[{i}] begin")
    body_end = _calls_end(full, messages, i, start, render, ends)
    said, alone = full[start:body_end][-_TAIL:], _tried(render, messages[: i + 1], False)
    last = alone.rpartition(said)[2].lstrip() if alone is not None and said in alone else None
    return start, _end(full, messages, i, body_end, last, ends)


def _calls_end(full: str, messages: Messages, i: int, start: int, render: Render, ends: re.Pattern[str]) -> int:
    calls = messages[i]["tool_calls"]
    arguments: Any = {MARK: MARK}
    if isinstance(calls[-1]["function"]["arguments"], str):
        arguments = json.dumps(arguments)
    other = {**calls[-1], "function": {"name": MARK, "arguments": arguments}}
    if "id" in other:
        other["id"] = "a" * len(other["id"])  # some templates want nine characters
    more = _tried(render, _calling_also(messages, i, [*calls, other]), False)
    if more is not None and MARK in more:
        at = len(_common(full, more))
    else:  # one call at a time: what follows it is the end of the turn
        changed = _tried(render, _calling_also(messages, i, [*calls[:-1], other]), False)
        if changed is None or MARK not in changed:
            raise _lost(f"it does not show where the calls of messages[{i}] end")
        at = max(len(full) - len(_common(full[::-1], changed[::-1])), start)
    if at < start:
        raise _lost(f"the text before the calls of messages[{i}] changes with them")
    # Where both go on with special tokens, these may begin alike.
    return next((found.start() for found in ends.finditer(full, start) if found.start() < at < found.end()), at)


def _calling_also(messages: Messages, i: int, calls: list[Any]) -> Messages:
    return [{**m, "tool_calls": calls} if j == i else m for j, m in enumerate(messages)]


def _start(full: str, head: str, messages: Messages, i: int, before: str | None, render: Render) -> int:
    asks = before is not None and before != _tried(render, messages[:i], False)
    if asks and before is not None and full.startswith(before):
        return len(before)  # what the template writes between its prompt and the content is the model's to say
    if not full.startswith(head):
        raise _lost(f"the text before messages[{i}] changes with its content")
    both = _tried(render, _with(_with(messages, i, MARK), i - 1, MARK_BEFORE), False) if i else None
    prompt = _tried(render, _with(messages[:i], i - 1, MARK_BEFORE), True) if i else None
    if both is None or prompt is None or MARK_BEFORE not in both or MARK_BEFORE not in prompt:
        return len(head)
    between, given = both.split(MARK)[0].rsplit(MARK_BEFORE)[-1], prompt.rsplit(MARK_BEFORE)[-1]
    said = between[len(given) :] if between.startswith(given) else ""
    return len(head) - len(said) if asks or said.isspace() else len(head)


def _last(messages: Messages, i: int, render: Render) -> str | None:
    """Return what follows a turn's content where the turn is the last one."""
    if i + 1 == len(messages):
        return None
    alone = _tried(render, _with(messages[: i + 1], i, MARK), False)
    return alone.rsplit(MARK)[-1].lstrip() if alone is not None and MARK in alone else None


def _end(full: str, messages: Messages, i: int, body_end: int, last: str | None, ends: re.Pattern[str]) -> int:
    after = full[body_end:].lstrip()
    at = len(full) - len(after)
    closing = after
    if i + 1 < len(messages):
        # Only what also stands there when the turn is the last is the turn's own; the rest is the next one's header.
        last = after if last is None else last
        closing = _common(after, last)
        special = ends.search(after)
        if special and special.end() > len(closing):
            if special.start() == 0 and ends.match(last) and ends.match(after[special.end() :].lstrip()):
                return at + special.end()  # one end for the last turn, another for earlier ones, then a header
            closing = closing[: special.start()]
    if found := ends.search(closing):
        return at + found.end()
    line = closing.split("\n", 1)[0].rstrip()  # an end that is plain text to this tokenizer
    return at + len(line) if line else body_end


def _common(a: str, b: str) -> str:
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _with(messages: Messages, i: int, content: str) -> Messages:
    return [{**m, "content": content} if j == i else m for j, m in enumerate(messages)]


def _tried(render: Render, messages: Messages, prompt: bool) -> str | None:
    """Render a part of the conversation, or None: many templates refuse one that the whole does not show."""
    if not messages:
        return None
    try:
        return render(messages, prompt)
    except TemplateError:
        return None


def _lost(why: str) -> ModelError:
    return ModelError(
        f"the chat template does not show which tokens the assistant says: {why}",
        wanted="a template that renders each message's content once, in order",
        fix="mark the assistant's part with {% generation %} … {% endgeneration %} in data.chat_template",
    )
