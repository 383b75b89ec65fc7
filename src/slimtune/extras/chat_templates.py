"""Chat templates: a file of the user's, one of the built-in ones by its name, or one that fits a base without any.

A built-in template ends the assistant's turn with one token, so that an answer has an end. Which one a base gets is
decided by its vocabulary: the tokens of a template's turns must be tokens there. `plain` needs none but an end of text.
The names are those of llama.cpp's --chat-template and of TRL.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ..core.data.chat_template import adds_bos
from ..core.foundation.chat_rendering import CHAT_TEMPLATES, render_chat_template
from ..errors import UsageError, format_names, suggest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltInChatTemplate:
    """A template that comes with slimtune; the text begins after the beginning-of-sequence token."""

    turn_tokens: tuple[str, ...]  # that must be tokens of the vocabulary
    text: str


def _make_turns(turn: str, generation_prompt: str) -> str:
    end = "{% if add_generation_prompt %}{{ " + generation_prompt + " }}{% endif %}"
    return "{% for message in messages %}{{ " + turn + " }}{% endfor %}" + end


CHATML = BuiltInChatTemplate(
    ("<|im_start|>", "<|im_end|>"),
    _make_turns(
        r"'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'", r"'<|im_start|>assistant\n'"
    ),
)
LLAMA3 = BuiltInChatTemplate(
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    _make_turns(
        r"'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>'",
        r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    ),
)
GEMMA = BuiltInChatTemplate(
    ("<start_of_turn>", "<end_of_turn>"),
    # Gemma has no system turn: its text begins the first turn of the user.
    "{% if messages[0]['role'] == 'system' %}"
    r"{% set system = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the turns of user and assistant must alternate, and the user begins') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    r"{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') }}"
    r"{{ message['content'] | trim + '<end_of_turn>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
)
PLAIN = BuiltInChatTemplate(
    (),
    _make_turns(
        r"'### ' + message['role'] | capitalize + ':\n' + message['content'] + "
        r"(eos_token if message['role'] == 'assistant' else '') + '\n\n'",
        r"'### Assistant:\n'",
    ),
)


def set_chat_template(tokenizer: Any, given: str | Path | None, base_name_for_messages: str) -> None:
    """Give a tokenizer the template that was asked for; one without a template gets a built-in one that fits.

    Args:
        tokenizer: is changed.
        given: a built-in template's name, a Jinja file, or Jinja text; None: the tokenizer's own.
        base_name_for_messages: for messages.

    Raises:
        UsageError: there is no such file, it is no Jinja text, or the vocabulary lacks a built-in template's tokens.
    """
    if given is not None:
        name = str(given)
        tokenizer.chat_template = (
            _make_text(name, tokenizer, base_name_for_messages)
            if name in CHAT_TEMPLATES.names()
            else read_chat_template(given)
        )
        _require_jinja(tokenizer)
    elif tokenizer.chat_template is None and (fitting := choose_built_in_template_name(tokenizer)) is not None:
        tokenizer.chat_template = _make_text(fitting, tokenizer, base_name_for_messages)
        _log_once(base_name_for_messages, fitting)


def choose_built_in_template_name(tokenizer: Any) -> str | None:
    """Return the first built-in template whose turns are tokens of the vocabulary; None if it has no end of text."""
    if tokenizer.eos_token is None:
        return None
    vocabulary = tokenizer.get_vocab()
    fits = (n for n, each in CHAT_TEMPLATES.load_all().items() if all(t in vocabulary for t in each.turn_tokens))
    return next(fits, None)


def is_built_in_template(text: Any) -> bool:
    """Return whether a tokenizer's template is one of the built-in ones, which no base brings."""
    return isinstance(text, str) and any(text.endswith(each.text) for each in CHAT_TEMPLATES.load_all().values())


def read_chat_template(given: str | Path) -> str:
    """Return the Jinja text of a chat template given as text or as a file; raise UsageError if there is none."""
    if isinstance(given, str) and ("{%" in given or "{{" in given):
        return given
    path = Path(given).expanduser()
    expected = f"a file of Jinja text in UTF-8, or one of {format_names(CHAT_TEMPLATES.names())}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = suggest(path.name, [*siblings, *CHAT_TEMPLATES.names()])
        raise UsageError(
            f"there is no chat template file {str(path)!r}{close}", expected, code="chat-template-missing"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the chat template {str(path)!r} cannot be read: {error}", expected) from error
    if not text.strip():
        raise UsageError(f"the chat template {str(path)!r} is empty", expected)
    return text


def _make_text(name: str, tokenizer: Any, base_name: str) -> str:
    template, vocabulary = CHAT_TEMPLATES.load(name), tokenizer.get_vocab()
    if lacking := [token for token in template.turn_tokens if token not in vocabulary]:
        fitting = choose_built_in_template_name(tokenizer)
        raise UsageError(
            f"the chat template {name} writes {format_names(lacking)}, and {base_name} has no such token: an answer "
            "would have no end",
            "a template whose turns are tokens of the vocabulary",
            f"--chat-template {fitting}" if fitting else "a Jinja file",
        )
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + template.text


def _require_jinja(tokenizer: Any) -> None:
    try:
        render_chat_template(tokenizer, [{"role": "user", "content": "x"}])
    except TemplateSyntaxError as error:
        message = f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
        raise UsageError(message, "Jinja text", code="chat-template-roles") from error
    except TemplateError as error:
        # It may need a system message or tools; then rendering the data reports the row.
        log.debug("the chat template does not render a lone user turn: %s", error)


@cache
def _log_once(base_name: str, template_name: str) -> None:
    text = "%s has no chat template: chats use the built-in one %s (another for training: --chat-template NAME or FILE)"
    log.warning(text, base_name, template_name)
