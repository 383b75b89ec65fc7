"""What answers: the base or an adapter of an adapted model, with the tokenizer that makes prompts and ends answers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from ..core.adapters.active_adapters import BASE_ROW
from ..core.data.chat_template import (
    Tools,
    encode_chat_with_train_mask,
    get_chat_template,
    list_special_and_added_token_ids,
    render_prompt,
)
from ..core.data.messages import Message
from ..core.models.base_config import get_max_positions
from ..core.training.trained_model import TrainedModel
from ..errors import DataError, ModelError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationModel:
    """The base or an adapter, as the generator runs it."""

    adapter_or_base: str  # its name in the adapted model; `BASE_ROW` for the base
    tokenizer: Any = field(repr=False)
    end_tokens: frozenset[int]  # that end an answer
    max_length: int | None  # tokens of a prompt and its answer together; None: any number

    def tokenize_prompt(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """Return the ids of a rendered conversation, up to where the assistant's turn begins.

        Raises:
            UsageError: the prompt is empty, the template rejects the messages, or there is no room for the answer.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UsageError("the prompt is empty", "a text")
        ids = tokenize_chat_prompt(self.tokenizer, messages)
        if self.max_length is not None and len(ids) + max_new_tokens > self.max_length:
            room = self.max_length - len(ids)
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the answer may have {max_new_tokens}, "
                f"the model's context holds {self.max_length}",
                f"at most {self.max_length} tokens together",
                f"--max-new-tokens {room}" if room > 0 else "a shorter prompt (in a chat: /new)",
            )
        return ids


def make_base_and_tuned_models(trained: TrainedModel) -> dict[str, GenerationModel]:
    """Return the models "base" and "tuned" of a run that is loaded; raise ModelError without a chat template."""
    get_chat_template(trained.base.tokenizer)
    adapters = {"base": BASE_ROW, "tuned": trained.adapter_name}
    return {name: make_generation_model(trained.model, trained.base.tokenizer, a) for name, a in adapters.items()}


def make_generation_model(model: Any, tokenizer: Any, adapter_or_base_row: str) -> GenerationModel:
    """Return the base (`BASE_ROW`) or an adapter of an adapted model, with its end tokens and context."""
    ends = frozenset(find_end_token_ids(getattr(model, "generation_config", None), tokenizer))
    context = get_max_positions(model.config)
    virtual_tokens = getattr(model.peft_config.get(adapter_or_base_row), "num_virtual_tokens", None) or 0
    return GenerationModel(adapter_or_base_row, tokenizer, ends, None if context is None else context - virtual_tokens)


def describe_trained_model(trained: TrainedModel) -> str:
    """Return the base, the method and the adapter folder of a run that is loaded, in words."""
    method = trained.model.active_peft_config.name
    return f"{trained.base.source.name} with the {method} adapter in {trained.adapter_folder}"


def tokenize_chat_prompt(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> list[int]:
    """Return the ids of a rendered conversation, up to where the assistant's turn begins.

    Raises:
        UsageError: the template rejects the messages, or writes nothing.
        DataError: it leaves out a call or a tool.
    """
    try:
        text = render_prompt(tokenizer, list(messages), tools)
    except TemplateError as e:
        roles = ", ".join(m["role"] for m in messages)
        raise UsageError(
            f"the chat template of the base rejects these messages ({roles}): {e}",
            "roles that the template supports, in its order",
            "leave the system message out" if messages[0]["role"] == "system" else "",
        ) from e
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the chat template writes nothing for these messages", "a template that writes them")
    return ids


def find_end_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer for the checkpoint, the tokenizer or the chat template, sorted.

    Raises:
        ModelError: the checkpoint's generation_config.json names an end token that is no id.
    """
    stated = getattr(generation_config, "eos_token_id", None)
    stated = stated if isinstance(stated, list | tuple) else [stated]
    if any(type(token) is not int for token in stated if token is not None):
        raise ModelError(f"generation_config.json has eos_token_id = {stated!r}", "a token's id, or a list of ids")
    ends = {*stated, tokenizer.eos_token_id}
    try:
        chat = encode_chat_with_train_mask(
            tokenizer, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        )
    except (DataError, ModelError) as e:
        log.debug("the chat template does not show how a turn ends: %s", e)
    else:
        learned = [token for token, learn in zip(chat.input_ids, chat.supervised, strict=True) if learn]
        ends |= {token for token in learned[-1:] if token in list_special_and_added_token_ids(tokenizer)}
    return tuple(sorted(end for end in ends if end is not None))
