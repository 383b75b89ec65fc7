"""Texts: a prompt with its completion, and a text that is learned whole."""

from ...core.data.messages import RowError
from ...core.data.rows import Fields, Record, RowFormat
from ..message_parsing import parse_messages_and_train_mask, require_text
from .chats import make_chat_row_fields
from .pair_prompts import SHOWN_CHARACTERS, answer_begins_with_prompt, remove_repeated_prompt


def parse_prompt_completion_fields(record: Record) -> Fields:
    """Return the fields of a prompt with its completion: two texts, or two lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        completion = require_text(completion, "'completion'")
        prompt = require_text(prompt, "'prompt'", allow_empty=True)
        is_repeated = answer_begins_with_prompt(prompt, completion)
        findings = (("prompt-in-completion", repr(prompt[:SHOWN_CHARACTERS])),) if is_repeated else ()
        return {"messages": [], "prompt": prompt, "completion": completion, "findings": findings}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("'prompt' and 'completion' are a text and a list: wanted two texts or two lists", "wrong-type")
    before, _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
    after, learned = parse_messages_and_train_mask(completion, "completion")
    own = remove_repeated_prompt(before, after, "'completion'")
    return make_chat_row_fields(record, before + own, (False,) * len(before) + learned[len(after) - len(own) :])


def parse_text_record(record: Record) -> Fields:
    """Return the fields of a text that is learned whole."""
    return {"messages": [], "completion": require_text(record["text"], "'text'")}


PROMPT_COMPLETION = RowFormat(
    ("prompt", "completion"),
    ("tools",),
    parse_prompt_completion_fields,
    note="texts without a chat template",
    synonyms={"completion": ("response", "answer", "output", "reply")},
    partner_columns=("input",),
)
TEXT = RowFormat(
    ("text",),
    (),
    parse_text_record,
    synonyms={"text": ("content", "document", "body")},
    partner_columns=(
        "prompt", "question", "instruction", "input", "answer", "response", "output", "completion", "target", "summary",
    ),
)  # fmt: skip
