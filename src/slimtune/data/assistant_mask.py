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

from slimtune.errors import DataError, ModelError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
Span = tuple[int, int]

MARK, MARK_BEFORE = "qZ7slimtuneX1", "qZ7slimtuneX2"
_APART = "leave out the content beside the call, or give another template (data.chat_template)"
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
        DataError: it writes a tool's result within a turn.
    """
    spans = [_turn(full, messages, i, render, ends) for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            _require_outside(full, messages, i, spans, render)
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        raise _lost("its turns overlap")
    return spans


def _require_outside(full: str, messages: Messages, i: int, spans: list[Span], render: Render) -> None:
    """Raise where a tool's result stands within an assistant's turn, as where a template moves a call's content."""
    marked = _tried(render, _with(messages, i, MARK + messages[i]["content"]), False)
    at = len(_common(full, marked)) if marked is not None and MARK in marked else None
    if at is not None and any(start < at < end for start, end in spans):
        raise DataError(
            f"the chat template writes messages[{i}] (tool) within the turn that called it",
            hint=_APART,
        )


def _turn(full: str, messages: Messages, i: int, render: Render, ends: re.Pattern[str]) -> Span:
    if messages[i].get("tool_calls"):
        return _calling(full, messages, i, render, ends)
    before = _tried(render, messages[:i], True)
    content, marked = messages[i]["content"].strip(), _with(messages, i, MARK)
    if before is not None and full.startswith(before):
        body = len(before) + len(full[len(before) :]) - len(full[len(before) :].lstrip())
        if full.startswith(content, body):
            return len(before), _end(full, marked, i, MARK, body + len(content), render, ends)
    text = _tried(render, marked, False)
    if text is None or text.count(MARK) != 1:
        raise _lost(f"it does not render the content of messages[{i}] exactly once")
    head, tail = text.split(MARK)
    if not full.endswith(tail):
        raise _lost(f"the text after messages[{i}] changes with its content")
    body_end = len(full) - len(tail)
    start = _start(full, head, messages, i, before, render)
    if not start < body_end:
        raise _lost(f"messages[{i}] leaves nothing to say")
    return start, _end(full, marked, i, MARK, body_end, render, ends)


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
    end = _end(full, messages, i, full[start:body_end][-_TAIL:], body_end, render, ends)
    if messages[i].get("content", "").strip() not in full[start:end]:
        raise DataError(f"the chat template writes the content of messages[{i}] apart from its calls", hint=_APART)
    return start, end


def _calls_end(full: str, messages: Messages, i: int, start: int, render: Render, ends: re.Pattern[str]) -> int:
    calls = messages[i]["tool_calls"]
    # Of the same name, which some templates write once more above the result; some want ids of nine characters.
    other = with_arguments(calls[-1], MARK)
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


def with_arguments(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return a call with other arguments, spelled as its own are."""
    arguments: Any = {mark: mark}
    if isinstance(call["function"]["arguments"], str):
        arguments = json.dumps(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


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


def _end(full: str, messages: Messages, i: int, said: str, body_end: int, render: Render, ends: re.Pattern[str]) -> int:
    """Return where turn i ends, whose own words end at `body_end`; they end with `said` in renderings of `messages`."""
    after = full[body_end:].lstrip()
    at = len(full) - len(after)
    closing = after
    if i + 1 < len(messages):
        # Only what also stands there when the turn is the last is the turn's own; the rest is the next one's header.
        last = _behind(said, messages[: i + 1], render)
        last = after if last is None else last
        closing = _common(after, last)
        special = ends.search(after)
        if special and special.end() > len(closing):
            if special.start() == 0 and ends.match(last) and ends.match(after[special.end() :].lstrip()):
                return at + special.end()  # one end for the last turn, another for earlier ones, then a header
            closing = closing[: special.start()]
    if found := ends.search(closing):
        return at + _all_ends(closing, found.end(), messages, i, said, render, ends)
    line = closing.split("\n", 1)[0].rstrip()  # an end that is plain text to this tokenizer
    return at + len(line) if line else body_end


def _all_ends(
    closing: str, end: int, messages: Messages, i: int, said: str, render: Render, ends: re.Pattern[str]
) -> int:
    """Return the end of the special tokens that close a turn one after another; calls may have lines between them."""
    calls = messages[i].get("tool_calls")

    def further() -> re.Match[str] | None:
        return ends.match(closing, end + (len(closing[end:]) - len(closing[end:].lstrip()) if calls else 0))

    if further() and i + 1 == len(messages):
        # Some templates close the whole conversation, too: what stands there before another message is the turn's.
        follows = {"role": "tool", "name": calls[-1]["function"]["name"]} if calls else {"role": "user"}
        if calls and "id" in calls[-1]:
            follows["tool_call_id"] = calls[-1]["id"]
        followed = _behind(said, [*messages, {**follows, "content": MARK_BEFORE}], render)
        closing = closing[: max(end, len(_common(closing, followed or "")))]
    while found := further():
        end = found.end()
    return end


def _behind(said: str, messages: Messages, render: Render) -> str | None:
    """Return what follows the last `said` in a rendering."""
    text = _tried(render, messages, False)
    return text.rpartition(said)[2].lstrip() if text is not None and said in text else None


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
        expected="a template that renders each message's content once, in order",
        hint="mark the assistant's part with {% generation %} … {% endgeneration %} in data.chat_template",
    )
