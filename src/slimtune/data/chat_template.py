"""A conversation as tokens, and which of them are to be learned: the assistant's words and the token that ends them.

The conversation is rendered once as text and tokenized once; spans of characters become a mask over tokens by the
offsets of that one tokenization, so the ids are those of `tokenizer.apply_chat_template` and a token is never split.
Headers, other roles and white space after the end-of-turn token are never learned. `{% generation %}` marks of a
template are taken as they stand; for every other template the spans are derived (turns.py).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from slimtune.data.assistant_mask import Messages, Span, assistant_spans
from slimtune.data.message_variants import spelled
from slimtune.errors import DataError, ModelError

Tools = list[dict[str, Any]] | None
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids of a conversation, and for each whether the model learns to say it. Both have length L."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation and the spans `[start, end)` of characters which the model learns to say."""

    text: str
    spans: list[Span]


def encode_chat(tokenizer: Any, messages: Messages, tools: Tools = None) -> TokenizedRow:
    """Return the tokens of a conversation and their mask.

    Raises:
        ModelError: no chat template, no fast tokenizer, or a template that does not show the assistant's turns.
        DataError: the template refuses these messages, or leaves one out.
    """
    rendered = render_chat(tokenizer, messages, tools)
    ids, offsets = tokenize(tokenizer, [rendered.text])
    return TokenizedRow(ids[0], supervised(rendered, offsets[0]))


def render_chat(
    tokenizer: Any,
    messages: Messages,
    tools: Tools = None,
    learned: Sequence[bool] | None = None,
    ends: re.Pattern[str] | None = None,
) -> RenderedChat:
    """Return the rendered text with the spans of the assistant's turns, tool calls among them.

    Args:
        tokenizer: with a chat template.
        messages: in the form that messages.py gives them.
        tools: JSON schemas of the functions that may be called.
        learned: for each message whether it is learned; None: each of the assistant's is.
        ends: `special_tokens(tokenizer)`, where many rows are rendered.

    Raises:
        ModelError, DataError: as `encode`.
    """
    template = get_chat_template(tokenizer, tools)
    more = {} if tools is None else {"tools": tools}

    def rendered(some: Messages, prompt: bool) -> str:
        return tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=prompt, **more)

    try:
        messages, text = spelled(messages, tools, lambda some: rendered(some, False))
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error}", hint="repair it") from error
    except TemplateError as error:
        fix = "change the row, or give another template (data.chat_template)"
        raise DataError(f"the chat template refuses these messages: {error}", hint=fix) from error
    ends = ends or special_tokens(tokenizer)
    if _GENERATION.search(template):
        spans = _marked_spans(tokenizer, messages, more, text, ends)
    else:
        spans = assistant_spans(text, messages, rendered, ends)
    return RenderedChat(text, spans if learned is None else _chosen(spans, messages, learned))


def render_text(tokenizer: Any, prompt: str, completion: str) -> RenderedChat:
    """Return a text without a template: what the tokenizer puts in front, the prompt, the completion and an end.

    Raises:
        ModelError: the tokenizer has no token that ends a text.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end-of-text token, so a completion would have no end", "an eos_token", "give it one"
        )
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    begun = tokenizer.bos_token if tokenizer.bos_token is not None and first == [tokenizer.bos_token_id] else ""
    text = f"{begun}{prompt}{completion}{tokenizer.eos_token}"
    return RenderedChat(text, [(len(begun) + len(prompt), len(text))])


def tokenize(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[Span]]]:
    """Return ids and character offsets of rendered texts, with no special token added: the template wrote them.

    Raises:
        ModelError: the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        got = f"{type(tokenizer).__name__} is not a fast tokenizer: it does not say where its tokens lie in the text"
        raise ModelError(got, expected="a tokenizer.json beside the model", hint="convert it to the fast format")
    if not texts:
        return [], []
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def supervised(rendered: RenderedChat, offsets: Sequence[Span]) -> list[bool]:
    """Return for each token whether it lies in a span.

    A token that begins before its span is the model's to say only if what it takes from there is white space
    (`" Hello"` after `[/INST]`); with a piece of the header in it, it is not.
    """
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    mask = [False] * len(offsets)
    for start, stop in rendered.spans:
        first, last = bisect_right(ends, start), bisect_left(begins, stop)
        while first < last and begins[first] < start and not rendered.text[begins[first] : start].isspace():
            first += 1
        mask[first:last] = [True] * (last - first)
    return mask


def get_chat_template(tokenizer: Any, tools: Tools = None) -> str:
    """Return the template's text.

    Raises:
        ModelError: the tokenizer has none, or several and no default.
    """
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        several = isinstance(tokenizer.chat_template, dict)
        got = f"this model has {'several chat templates and no default' if several else 'no chat template'}"
        wanted = "one that says how its conversations are written"
        fix = "give one: data.chat_template: FILE.jinja in the recipe, or --set data.chat_template=FILE.jinja"
        raise ModelError(got, expected=wanted, hint=fix) from error


def is_end_of_turn(tokenizer: Any, token: int) -> bool:
    """Return whether a token is one that can end a turn: a special or added one."""
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return what matches any special or added token of a tokenizer."""
    known = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    # Some vocabularies add runs of blanks: they end nothing.
    names = sorted((re.escape(t) for t in known if t.strip()), key=len, reverse=True)
    return re.compile("|".join(names) if names else r"(?!)")


def _chosen(spans: list[Span], messages: Messages, learned: Sequence[bool]) -> list[Span]:
    """Return the spans of the turns that are learned."""
    wanted = [said for said, m in zip(learned, messages, strict=True) if m["role"] == "assistant"]
    if len(wanted) != len(spans):
        raise ModelError(
            f"the chat template marks {len(spans)} parts for {len(wanted)} assistant turns, so single turns cannot be "
            "left out",
            "one {% generation %} block a turn",
            "give a template without marks (data.chat_template), or learn every turn",
        )
    return [span for span, said in zip(spans, wanted, strict=True) if said]


def _marked_spans(
    tokenizer: Any, messages: Messages, more: dict[str, Any], text: str, ends: re.Pattern[str]
) -> list[Span]:
    """Return the spans the template itself marks, without white space after a special token."""
    out = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        **more,
    )
    spans: list[Span] = []
    joined = False
    for (begin, end), inside in zip(out["offset_mapping"], out["assistant_masks"], strict=True):
        if inside and joined:
            spans[-1] = (spans[-1][0], end)
        elif inside:
            spans.append((begin, end))
        joined = bool(inside)
    return [(start, _without_blank(text, start, end, ends)) for start, end in spans]


def _without_blank(text: str, start: int, end: int, ends: re.Pattern[str]) -> int:
    said = text[start:end].rstrip()
    closed = any(found.end() == len(said) for found in ends.finditer(said))
    return start + len(said) if closed else end
