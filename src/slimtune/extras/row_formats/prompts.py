"""Prompts that the model answers itself, with whatever columns its rewards need."""

import json

from ...core.data.messages import RowError
from ...core.data.rows import Fields, Record, RowFormat
from ..message_parsing import parse_messages_and_train_mask, require_text
from .chats import parse_tools


def _read_prompt(record: Record) -> Fields:
    prompt, tools = record["prompt"], parse_tools(record.get("tools"))
    kept = json.dumps(dict(record), ensure_ascii=False, default=str)
    fields: Fields = {"labels": (kept,), "is_prompt": True, "tools": tools}
    if isinstance(prompt, str) and not prompt.lstrip().startswith("[{"):
        text = require_text(prompt, "'prompt'")
        if system := record.get("system"):
            system_turn = {"role": "system", "content": require_text(system, "'system'")}
            return fields | {"messages": [system_turn, {"role": "user", "content": text}]}
        return fields | {"messages": [], "prompt": text}
    messages, _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
    if not messages:
        raise RowError("'prompt' is empty", "empty-content")
    if messages[-1]["role"] == "assistant":
        cause = "'prompt' ends with an assistant turn, and the model is to answer it"
        raise RowError(cause, "answered-prompt", "end it with the user's turn; what rewards compare with is a column")
    return fields | {"messages": messages}


PROMPT = RowFormat(
    ("prompt",),
    ("system", "tools"),
    _read_prompt,
    by_name_only=True,
    takes_all_columns=True,
)
