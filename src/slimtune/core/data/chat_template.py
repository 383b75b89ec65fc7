"""A conversation as tokens, with a mask of the supervised ones: the assistant's words and the token that ends its turn.

The conversation is rendered once and tokenized once. Character spans become a token mask by the offsets of that one
tokenization, so the ids are those of `tokenizer.apply_chat_template` and no token is split. Headers, other roles and
white space after the end-of-turn token are never supervised. `{% generation %}` marks of a template are used as they
are; for every other template `assistant_mask` finds the spans.

Templates differ in how they take a tool call: arguments as an object or as JSON text, with an empty content or without
one. Variants of the messages are rendered until every call is in the text. What no variant shows is an error.
"""

import contextlib
import dataclasses
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ...errors import DataError, ModelError
from ..foundation.chat_rendering import TOOL_HINTS, render_chat_template
from .assistant_mask import MARK, Span, find_assistant_spans, replace_tool_call_arguments
from .messages import Message, Messages

Tools = list[dict[str, Any]] | None
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class RenderedText:
    """The text of a row, and the supervised `[start, end)` spans of its characters."""

    text: str
    spans: list[Span]
    assistant_turns: list[Span] = field(default_factory=list)  # of all assistant turns, learned or not
    thinking_turn_counts: tuple[int, int, int] = (0, 0, 0)  # by `messages.count_thinking_turns_by_use`
    generation_prompt_differs: bool = False  # whether generation would begin the last turn after another text


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids of a row, and for each whether the model learns to predict it. Both have length L.

    The two rows of a preference pair are one after the other, the better one first; `row_lengths` are their tokens.
    """

    input_ids: list[int]
    supervised: list[bool]
    thinking_turn_counts: tuple[int, int, int] = (0, 0, 0)  # as in `RenderedText`
    generation_prompt_differs: bool = False
    row_lengths: tuple[int, ...] | None = None

    def split(self) -> list["TokenizedRow"]:
        """Return the rows of a pair, or the row itself."""
        ends = list(itertools.accumulate(self.row_lengths or (len(self.input_ids),)))
        parts = [slice(end - n, end) for end, n in zip(ends, self.row_lengths or ends, strict=True)]
        return [
            dataclasses.replace(self, input_ids=self.input_ids[p], supervised=self.supervised[p], row_lengths=None)
            for p in parts
        ]

    def truncate(self, length: int) -> "TokenizedRow":
        """Return the row, or each of a pair, cut to its first `length` tokens."""
        return concatenate_pair_into_one_row(
            [
                dataclasses.replace(row, input_ids=row.input_ids[:length], supervised=row.supervised[:length])
                for row in self.split()
            ]
        )

    def is_open(self, end_ids: frozenset[int]) -> bool:
        """Return whether the last supervised token does not end a turn."""
        pairs = zip(reversed(self.input_ids), reversed(self.supervised), strict=True)
        return next((token not in end_ids for token, supervised in pairs if supervised), False)


def concatenate_pair_into_one_row(rows: Sequence[TokenizedRow]) -> TokenizedRow:
    """Return the rows of a pair as one, or a single row as it is."""
    if len(rows) == 1:
        return rows[0]
    ids = [token for row in rows for token in row.input_ids]
    # Nothing stands before the first token of a row to predict it from.
    supervised = [t > 0 and learned for row in rows for t, learned in enumerate(row.supervised)]
    return dataclasses.replace(
        rows[0], input_ids=ids, supervised=supervised, row_lengths=tuple(len(row.input_ids) for row in rows)
    )


def encode_chat_with_train_mask(tokenizer: Any, messages: Messages, tools: Tools = None) -> TokenizedRow:
    """Return the tokens of a conversation, in the form of `parse_messages_and_train_mask`, with their mask.

    Raises:
        ModelError: no chat template, no fast tokenizer, or a template that does not show the assistant's turns.
        DataError: the template refuses these messages, or leaves one out.
    """
    rendered = render_chat_with_spans(tokenizer, messages, tools)
    ids, offsets = tokenize_rendered_texts(tokenizer, [rendered.text])
    return TokenizedRow(ids[0], make_supervised_mask(rendered, offsets[0]))


def render_chat_with_spans(
    tokenizer: Any,
    messages: Messages,
    tools: Tools = None,
    learned: Sequence[bool] | None = None,
    special_token_pattern: re.Pattern[str] | None = None,
) -> RenderedText:
    """Return the rendered conversation with the spans of the assistant's turns, tool calls included.

    Args:
        tokenizer, messages, tools: see `encode_chat_with_train_mask`.
        learned: for each message whether it is learned; None: every assistant turn is.
        special_token_pattern: `compile_special_token_pattern(tokenizer)`, for callers that render many rows.
    """
    template = get_chat_template(tokenizer, tools)
    special_token_pattern = special_token_pattern or compile_special_token_pattern(tokenizer)

    def render(some: Messages, generation_prompt: bool = False) -> str:
        return render_chat_template(tokenizer, some, tools, add_generation_prompt=generation_prompt, template=template)

    try:
        messages, text = _render_complete(messages, tools, render)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is not valid Jinja: {error}", hint="repair it", code="chat-template-roles"
        ) from error
    except TemplateError as error:
        hint = "change the row, or use another chat template (data.chat_template)"
        raise DataError(f"the chat template refuses these messages: {error}", hint=hint) from error
    if _GENERATION.search(template):
        spans = _find_generation_spans(tokenizer, messages, tools, text, special_token_pattern)
    else:
        spans = find_assistant_spans(text, messages, render, special_token_pattern)
    all_spans = spans
    if learned is not None:
        turns = [chosen for chosen, m in zip(learned, messages, strict=True) if m["role"] == "assistant"]
        if len(turns) != len(spans):
            problem = f"the chat template marks {len(spans)} parts for {len(turns)} assistant turns, so single turns "
            hint = "use a template without marks (data.chat_template), or learn every turn"
            raise ModelError(f"{problem}cannot be left out", "one {% generation %} block a turn", hint)
        spans = [span for span, chosen in zip(spans, turns, strict=True) if chosen]
    return RenderedText(text, spans, all_spans)


def render_prompt(tokenizer: Any, messages: Messages, tools: Tools = None) -> str:
    """Return the text of a conversation up to where the next answer begins; with tools, they and all calls are in it.

    Raises:
        TemplateError: the template refuses the conversation.
        DataError: it leaves out a message, a call or a tool.
    """
    template = get_chat_template(tokenizer, tools)

    def render(some: Messages) -> str:
        return render_chat_template(tokenizer, some, tools, add_generation_prompt=True, template=template)

    if tools or any(m.get("tool_calls") for m in messages):
        return _render_complete(messages, tools, render)[1]
    return render(messages)


def prompt_differs_in_generation(tokenizer: Any, messages: Messages, tools: Tools, rendered_chat: RenderedText) -> bool:
    """Return whether the prompt of generation is another text than what stands before the last turn of a conversation.

    So it is if a template ends its prompt with `<think>` and writes none before an answer: then the model is asked
    with a prompt that it was never trained on. False if the template refuses the messages before the answer.
    """
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    try:
        prompt = render_chat_template(tokenizer, messages[:last], tools, add_generation_prompt=True)
    except TemplateError:
        return False
    return last > 0 and not rendered_chat.text.startswith(prompt)


def render_without_template(tokenizer: Any, prompt: str, completion: str) -> RenderedText:
    """Return a text without a template: the tokenizer's first token (if it adds one), prompt, completion, its end."""
    if tokenizer.eos_token is None:
        problem = "the tokenizer has no end-of-text token, so a completion would have no end"
        raise ModelError(problem, "an eos_token", "set one")
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    text = f"{bos}{prompt}{completion}{tokenizer.eos_token}"
    return RenderedText(text, [(len(bos) + len(prompt), len(text))])


def encode_document_with_special_tokens_as_text(tokenizer: Any, text: str) -> TokenizedRow:
    """Return the tokens of `render_without_template`, but special tokens typed in the text as ordinary text."""
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return TokenizedRow([*start, *ids, *end], [False] * len(start) + [True] * (len(ids) + len(end)))


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins a text with its beginning-of-sequence token."""
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]


def tokenize_rendered_texts(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[Span]]]:
    """Return ids and character offsets of rendered texts. No special token is added: the template wrote them."""
    if not getattr(tokenizer, "is_fast", False):
        problem = f"{type(tokenizer).__name__} is not a fast tokenizer: it gives no character offsets of its tokens"
        raise ModelError(problem, expected="a tokenizer.json beside the model", hint="convert it to the fast format")
    if not texts:
        return [], []
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def make_supervised_mask(rendered: RenderedText, offsets: Sequence[Span]) -> list[bool]:
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
    """Return the text of the chat template; raise ModelError if there is none, or several and no default."""
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        several = isinstance(tokenizer.chat_template, dict)
        problem = f"this model has {'several chat templates and no default' if several else 'no chat template'}"
        hint = "give one: data.chat_template: NAME or FILE.jinja (--chat-template); texts: --no-apply-chat-template"
        raise ModelError(problem, "one chat template", hint, code="chat-template-missing") from error


def list_special_and_added_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that can end a turn: every special and added token."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def compile_special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches any special or added token; added runs of blanks are left out."""
    known = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return compile_alternatives_pattern(t for t in known if t.strip())


def compile_alternatives_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these texts, the longest that fits."""
    return re.compile("|".join(sorted(map(re.escape, texts), key=len, reverse=True)) or r"(?!)")


def _find_generation_spans(
    tokenizer: Any, messages: Messages, tools: Tools, text: str, special_tokens: re.Pattern[str]
) -> list[Span]:
    """Return the spans that the template's own marks show, without white space after a special token."""
    marked: list[Span] = []
    render_chat_template(tokenizer, messages, tools, collected_spans=marked)
    spans: list[Span] = []
    for start, end in marked:
        if spans and spans[-1][1] == start:  # two marks that touch are one turn
            start = spans.pop()[0]
        words = text[start:end].rstrip()
        closed = any(found.end() == len(words) for found in special_tokens.finditer(words))
        if words:
            spans.append((start, start + len(words) if closed else end))
    return spans


def _render_complete(messages: Messages, tools: Tools, render: Callable[[Messages], str]) -> tuple[Messages, str]:
    """Return the variant of the messages that the template renders completely, and its text.

    Raise TemplateError if it refuses every variant, and DataError if it leaves out a message, a call or a tool.
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
        raise _left_out_error(f"tool calls of messages[{incomplete}]")
    raise refusal if isinstance(refusal, TemplateError) else TemplateError(str(refusal))


def _message_variants(messages: Messages) -> Iterator[Messages]:
    yield messages
    if any(m.get("tool_calls") for m in messages):
        no_content = [
            {k: v for k, v in m.items() if k != "content" or v} if m.get("tool_calls") else m for m in messages
        ]
        yield no_content
        for variant in (messages, no_content):
            calls = [[call["function"]["arguments"] for call in m.get("tool_calls", ())] for m in variant]
            texts = [[json.dumps(arguments, ensure_ascii=False) for arguments in turn] for turn in calls]
            yield [_replace_all_arguments(m, turn) for m, turn in zip(variant, texts, strict=True)]


def _replace_all_arguments(message: Message, arguments: list[Any]) -> Message:
    calls = zip(message.get("tool_calls", ()), arguments, strict=True)
    return (
        {**message, "tool_calls": list(itertools.starmap(replace_tool_call_arguments, calls))} if arguments else message
    )


def _find_missing_call(messages: Messages, render: Callable[[Messages], str]) -> int | None:
    """Return the number of a message with a call that the template does not write."""
    marks = [[f"{MARK}{i}x{k}x" for k, _ in enumerate(m.get("tool_calls", ()))] for i, m in enumerate(messages)]
    if not any(marks):
        return None
    turns = zip(messages, marks, strict=True)
    text = render([_replace_all_arguments(m, [{mark: mark} for mark in turn]) for m, turn in turns])
    return next((i for i, turn in enumerate(marks) if any(mark not in text for mark in turn)), None)


def _check_complete(messages: Messages, tools: Tools, text: str) -> None:
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            continue  # `find_assistant_spans` checks its content
        content = message.get("content", "").strip()
        if content not in text and not (message["role"] == "tool" and _contains_json(text, content)):
            raise _left_out_error(f"messages[{i}] ({message['role']})", "remove that message")
    for tool in tools or ():
        if (name := tool["function"]["name"]) not in text:
            raise _left_out_error(f"the tool {name!r}")


def _contains_json(text: str, content: str) -> bool:
    """Return whether a text contains a tool's result as a JSON string, or as JSON with other white space."""
    variants = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    if content.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            variants += [json.dumps(json.loads(content), ensure_ascii=ascii) for ascii in (False, True)]
    return any(variant in text for variant in variants)


def _left_out_error(what: str, remove: str = "") -> DataError:
    hint = f"{remove}, or use another chat template (data.chat_template)" if remove else TOOL_HINTS.load("bases")()
    return DataError(f"the chat template leaves out {what}", hint=hint)
