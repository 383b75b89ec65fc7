"""Render a conversation by a chat template, with the part that limits what a template may do (template_sandbox.py)."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .registry import Registry

TEMPLATE_RENDERERS: Registry[Callable[..., str]] = Registry("slimtune.template_renderers", "template language")
CHAT_TEMPLATES: Registry[Any] = Registry("slimtune.chat_templates", "chat template")
"""The built-in templates; a base without one gets the first that fits its vocabulary."""
CHAT_TEMPLATE_SETTERS: Registry[Callable[[Any, Any, str], None]] = Registry("slimtune.chat_template_setters", "setter")
"""Functions that give a tokenizer the template that was asked for (its name, file or text, or None) for a base."""
TOOL_HINTS: Registry[Callable[[], str]] = Registry("slimtune.tool_hints", "hint")
"""Functions that return what to do about rows with tools if the chat template writes none."""


@cache
def _load_renderer() -> Callable[..., str]:
    return TEMPLATE_RENDERERS.load("jinja")


def render_chat_template(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    template: str | None = None,
    collected_spans: list[tuple[int, int]] | None = None,
    **variables: Any,
) -> str:
    """Return the text of a conversation.

    Args:
        tokenizer: its chat template and special tokens are used.
        messages: plain JSON values.
        tools: JSON schemas of functions.
        add_generation_prompt: end with what asks for the next answer.
        template: used instead of the tokenizer's.
        collected_spans: gets the `[start, end)` characters that `{% generation %}` marks.
        variables: further ones of the template.

    Raises:
        TemplateError: the template refuses the conversation, or fails.
        ModelError: it takes too many steps.
        ValueError: the tokenizer has no template.
    """
    text = tokenizer.get_chat_template(tools=tools) if template is None else template
    values = {**tokenizer.special_tokens_map, "documents": None, **variables}
    values |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    return _load_renderer()(text, values, [] if collected_spans is None else collected_spans)
