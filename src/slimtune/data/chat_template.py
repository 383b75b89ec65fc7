"""A conversation as tokens, with a mask of the supervised ones: the assistant's words and the token that ends its turn.

The conversation is rendered once and tokenized once. Character spans become a token mask by the offsets of that one
tokenization, so the ids are those of `tokenizer.apply_chat_template` and no token is split. Headers, other roles and
white space after the end-of-turn token are never supervised. `{% generation %}` marks of a template are used as they
are; for every other template `assistant_mask` finds the spans.
"""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ..errors import DataError, ModelError
from .assistant_mask import Span, find_assistant_spans
from .message_variants import render_complete
from .messages import Messages

Tools = list[dict[str, Any]] | None
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class RenderedText:
    """The text of a row, and the supervised `[start, end)` spans of its characters."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids of a row, and for each whether the model learns to predict it. Both have length L."""

    input_ids: list[int]
    supervised: list[bool]

    def is_open(self, end_ids: frozenset[int]) -> bool:
        """Return whether the last supervised token does not end a turn."""
        pairs = zip(reversed(self.input_ids), reversed(self.supervised), strict=True)
        return next((token not in end_ids for token, supervised in pairs if supervised), False)


def encode_chat(tokenizer: Any, messages: Messages, tools: Tools = None) -> TokenizedRow:
    """Return the tokens of a conversation with their mask.

    Raises:
        ModelError: no chat template, no fast tokenizer, or a template that does not show the assistant's turns.
        DataError: the template refuses these messages, or leaves one out.
    """
    rendered = render_chat(tokenizer, messages, tools)
    ids, offsets = tokenize_texts(tokenizer, [rendered.text])
    return TokenizedRow(ids[0], mask_tokens(rendered, offsets[0]))


def render_chat(
    tokenizer: Any,
    messages: Messages,
    tools: Tools = None,
    learned: Sequence[bool] | None = None,
    special_tokens: re.Pattern[str] | None = None,
) -> RenderedText:
    """Return the rendered conversation with the spans of the assistant's turns, tool calls included.

    Args:
        tokenizer: has a chat template.
        messages: in the form of `validate_messages`.
        tools: JSON schemas of the functions that may be called.
        learned: for each message whether it is learned; None: every assistant turn is.
        special_tokens: `special_token_pattern(tokenizer)`, for callers that render many rows.

    Raises:
        ModelError, DataError: as `encode_chat`.
    """
    template = get_chat_template(tokenizer, tools)
    options = {} if tools is None else {"tools": tools}

    def render(some: Messages, generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=generation_prompt, **options)

    try:
        messages, text = render_complete(messages, tools, lambda some: render(some, False))
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error}", hint="repair it") from error
    except TemplateError as error:
        hint = "change the row, or use another chat template (data.chat_template)"
        raise DataError(f"the chat template refuses these messages: {error}", hint=hint) from error
    special_tokens = special_tokens or special_token_pattern(tokenizer)
    if _GENERATION.search(template):
        spans = _find_generation_spans(tokenizer, messages, options, text, special_tokens)
    else:
        spans = find_assistant_spans(text, messages, render, special_tokens)
    if learned is not None:
        turns = [chosen for chosen, m in zip(learned, messages, strict=True) if m["role"] == "assistant"]
        if len(turns) != len(spans):
            raise ModelError(
                f"the chat template marks {len(spans)} parts for {len(turns)} assistant turns, so single turns cannot "
                "be left out",
                "one {% generation %} block a turn",
                "use a template without marks (data.chat_template), or learn every turn",
            )
        spans = [span for span, chosen in zip(spans, turns, strict=True) if chosen]
    return RenderedText(text, spans)


def render_text(tokenizer: Any, prompt: str, completion: str) -> RenderedText:
    """Return a text without a template: the tokenizer's first token (if it adds one), prompt, completion and its end.

    Raises:
        ModelError: the tokenizer has no token that ends a text.
    """
    if tokenizer.eos_token is None:
        problem = "the tokenizer has no end-of-text token, so a completion would have no end"
        raise ModelError(problem, "an eos_token", "set one")
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    bos = tokenizer.bos_token if tokenizer.bos_token is not None and first == [tokenizer.bos_token_id] else ""
    text = f"{bos}{prompt}{completion}{tokenizer.eos_token}"
    return RenderedText(text, [(len(bos) + len(prompt), len(text))])


def tokenize_texts(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[Span]]]:
    """Return ids and character offsets of rendered texts. No special token is added: the template wrote them.

    Raises:
        ModelError: the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        problem = f"{type(tokenizer).__name__} is not a fast tokenizer: it gives no character offsets of its tokens"
        raise ModelError(problem, expected="a tokenizer.json beside the model", hint="convert it to the fast format")
    if not texts:
        return [], []
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def mask_tokens(rendered: RenderedText, offsets: Sequence[Span]) -> list[bool]:
    """Return for each token whether it is in a supervised span.

    A token that begins before its span is supervised only if its part before the span is white space (`" Hello"` after
    `[/INST]`), but not if that part belongs to the header.
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
    """Return the text of the chat template.

    Raises:
        ModelError: the tokenizer has none, or several and no default.
    """
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        several = isinstance(tokenizer.chat_template, dict)
        raise ModelError(
            f"this model has {'several chat templates and no default' if several else 'no chat template'}",
            "one chat template",
            "give one: data.chat_template: FILE.jinja in the recipe, or --set data.chat_template=FILE.jinja",
        ) from error


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that can end a turn: every special and added token."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches any special or added token; added runs of blanks are left out."""
    known = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return compile_alternatives(t for t in known if t.strip())


def compile_alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these texts, the longest that fits."""
    return re.compile("|".join(sorted(map(re.escape, texts), key=len, reverse=True)) or r"(?!)")


def _find_generation_spans(
    tokenizer: Any, messages: Messages, options: dict[str, Any], text: str, special_tokens: re.Pattern[str]
) -> list[Span]:
    """Return the spans that the template's own marks show, without white space after a special token."""
    out = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        **options,
    )
    tokens = zip(out["offset_mapping"], out["assistant_masks"], strict=True)
    runs = [
        [offset for offset, _ in run] for marked, run in itertools.groupby(tokens, lambda token: token[1]) if marked
    ]
    spans = []
    for run in runs:
        start, end = run[0][0], run[-1][1]
        words = text[start:end].rstrip()
        closed = any(found.end() == len(words) for found in special_tokens.finditer(words))
        spans.append((start, start + len(words) if closed else end))
    return spans
