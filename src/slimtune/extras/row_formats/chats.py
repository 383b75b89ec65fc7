"""Conversations: messages, ShareGPT's turns, and instructions with an answer."""

from typing import Any

from ...core.data.messages import Messages, RowError
from ...core.data.rows import Fields, Record, RowFormat
from ...errors import format_names, suggest
from ..message_parsing import (
    parse_json_cell,
    parse_list_or_json_array,
    parse_messages_and_train_mask,
    require_limited_json_depth,
    require_strings,
    require_text,
)

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's `from` → role. The value of a `function_call` is JSON text: one call or a list of calls."""


def _read_chat(record: Record) -> Fields:
    return make_chat_row_fields(record, *parse_messages_and_train_mask(record["messages"]))


def _read_sharegpt(record: Record) -> Fields:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages = [*system, *_convert_sharegpt(record["conversations"])]
    return make_chat_row_fields(record, *parse_messages_and_train_mask(messages, "conversations"))


def _read_instruction(record: Record) -> Fields:
    instruction = require_text(record["instruction"], "'instruction'")
    given = require_text(record.get("input") or "", "'input'", allow_empty=True)
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction},
        {"role": "assistant", "content": require_text(record["output"], "'output'")},
    ]
    if system := record.get("system"):
        messages.insert(0, {"role": "system", "content": require_text(system, "'system'")})
    return {"messages": messages}


def _convert_sharegpt(value: Any) -> Messages:
    """Return a ShareGPT conversation (`from`, `value`) as messages that are not validated yet.

    Turns that have a role instead of `from` stay as they are.
    """
    messages = []
    for i, turn in enumerate(parse_list_or_json_array(value, "conversations")):
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        name = f"conversations[{i}]"
        require_strings(turn, ("from", "value"), name)
        speaker, message = turn["from"], {k: v for k, v in turn.items() if k not in ("from", "value")}
        if speaker not in SHAREGPT_ROLES:
            known = f"{suggest(speaker, SHAREGPT_ROLES)} (known: {format_names(SHAREGPT_ROLES, most=20)})"
            raise RowError(f"{name} is from the unknown {speaker!r}{known}", "unknown-role")
        if speaker == "function_call":
            calls = parse_json_cell(turn["value"], f"{name}.value", "bad-tool-call")
            message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        elif message.get("content") is not None:
            raise RowError(f"{name} has a 'value' and a 'content'", "unknown-key")
        else:
            message["content"] = turn["value"]
        messages.append({"role": SHAREGPT_ROLES[speaker], **message})
    return messages


def make_chat_row_fields(record: Record, messages: Messages, learned: tuple[bool, ...]) -> Fields:
    """Return the fields of a conversation; `learned` says for each message whether the model learns it."""
    every_turn = tuple(m["role"] == "assistant" for m in messages)
    roles = [m["role"] for m in messages if m["role"] not in ("system", "developer")]
    return {
        "messages": messages,
        "learned": None if learned == every_turn else learned,
        "tools": parse_tools(record.get("tools")),
        "findings": (("swapped-roles", ""),) if (roles[0], roles[-1]) == ("assistant", "user") else (),
    }


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of functions as OpenAI writes them, None for no tools; raise RowError for a wrong one."""
    if value is None or value in ("", []):
        return None
    tools = parse_list_or_json_array(value, "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{i}] is not the JSON schema of a function: it has no name", "bad-tool")
        require_limited_json_depth(tool, f"tools[{i}]")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


CHAT = RowFormat(
    ("messages",),
    ("tools",),
    _read_chat,
    synonyms={"messages": ("dialog", "dialogue", "conversation", "chat", "turns")},
)
INSTRUCTION = RowFormat(
    ("instruction", "output"),
    ("input", "system"),
    _read_instruction,
    note="a chat",
    synonyms={
        "instruction": ("prompt", "question", "query", "problem", "user"),
        "input": ("context", "passage"),
        "output": ("response", "answer", "completion", "reply", "solution", "assistant", "summary"),
    },
)
SHAREGPT = RowFormat(("conversations",), ("system", "tools"), _read_sharegpt)
