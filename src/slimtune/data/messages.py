"""Validation of the messages of one row.

    {"role": "system" | "user", "content": str}
    {"role": "assistant", "content": str, "tool_calls": [{"type": "function", "function": {"name", "arguments"}}]}
    {"role": "tool", "content": str, "name": str, "tool_call_id": str}

`validate_messages` returns this form, which every chat template takes. Tool arguments are an object here, whether the
file has an object or JSON text. A message may have a `weight` (1: learned, 0: not); it is returned apart and never
reaches a template. An unknown key is an error, because it would change the text of the turn or be lost.
"""

import json
from typing import Any

from ..errors import format_names, nearest

Messages = list[dict[str, Any]]
MESSAGE_KEYS = {
    "system": ("role", "content", "weight"),
    "user": ("role", "content", "weight"),
    "assistant": ("role", "content", "tool_calls", "weight"),
    "tool": ("role", "content", "name", "tool_call_id", "weight"),
}
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's `from` → role. The value of a `function_call` is JSON text: one call or a list of calls."""


class RowError(ValueError):
    """A row is invalid.

    Args:
        cause: what is wrong, for people.
        code: the kind of error, in kebab case.
    """

    def __init__(self, cause: str, code: str) -> None:
        super().__init__(cause)
        self.code = code


def validate_messages(
    value: Any, column: str = "messages", *, needs_assistant: bool = True
) -> tuple[Messages, tuple[bool, ...]]:
    """Return validated messages, and for each whether the model learns it.

    Args:
        value: a list of messages, or its JSON text.
        column: the column's name, for error messages.
        needs_assistant: require an assistant turn that is learned.

    Raises:
        RowError: the first error of the row.
    """
    messages, learned = [], []
    for i, message in enumerate(require_list(value, column)):
        messages.append(_validate_message(message, f"{column}[{i}]"))
        learned.append(_is_learned(message, f"{column}[{i}]"))
    if needs_assistant:
        require_assistant(messages)
        if not any(learned):
            raise RowError("every assistant turn has weight 0, so there is nothing to learn", "nothing-to-learn")
    return messages, tuple(learned)


def _validate_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"{name} is not an object but {json_type(message)}", "wrong-type")
    role, calls = message.get("role"), message.get("tool_calls")
    for key in ("role", "content"):
        if key == "content" and role == "assistant" and calls and message.get(key) is None:
            continue  # tool calls without a text
        if key not in message:
            raise RowError(f"{name} has no {key!r}{nearest(key, message)}", "missing-key")
        if not isinstance(message[key], str):
            raise RowError(f"{name}.{key} is not a string but {json_type(message[key])}", "wrong-type")
    if role not in MESSAGE_KEYS:
        known = f"{nearest(str(role), MESSAGE_KEYS)} (known: {format_names(MESSAGE_KEYS)})"
        raise RowError(f"{name} has the unknown role {role!r}{known}", "unknown-role")
    keys = MESSAGE_KEYS[role]
    if unknown := [k for k in message if k not in keys and message[k] is not None]:
        known = f"(known: {format_names(keys)})"
        raise RowError(f"{name} has keys that are not used: {format_names(unknown)} {known}", "unknown-key")
    content = message.get("content") or ""
    if not content.strip() and not calls and role != "tool":  # a tool may return an empty text
        raise RowError(f"{name} ({role}) has empty content", "empty-content")
    valid = {"role": role, "content": require_text(content, f"{name} ({role})", allow_empty=True)}
    if calls is not None and calls != []:
        found = enumerate(require_list(calls, f"{name}.tool_calls"))
        valid["tool_calls"] = [_validate_tool_call(call, f"{name}.tool_calls[{i}]") for i, call in found]
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            valid[key] = require_text(message[key], f"{name}.{key}")
    return valid


def _validate_tool_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowError(f"{name} is not an object but {json_type(function)}", "bad-tool-call")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{name} names no function{nearest('name', function)}", "bad-tool-call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{name}.arguments", "bad-tool-call")
    if not isinstance(arguments, dict):
        raise RowError(f"{name}.arguments is not an object but {json_type(arguments)}", "bad-tool-call")
    valid = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        valid["id"] = require_text(call["id"], f"{name}.id")
    return valid


def _is_learned(message: dict[str, Any], name: str) -> bool:
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return role == "assistant"
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{name}.weight is {weight!r}: a turn is learned (1) or not (0)", "bad-weight")
    if weight == 1 and role != "assistant":
        raise RowError(f"{name}.weight is 1, but a {role} turn is never learned", "bad-weight")
    return bool(weight)


def convert_sharegpt(value: Any, column: str = "conversations") -> Messages:
    """Return a ShareGPT conversation (`from`, `value`) as messages that are not validated yet.

    Turns that have a role instead of `from` stay as they are.

    Raises:
        RowError: a turn has neither, or an unknown speaker.
    """
    return [_convert_turn(turn, f"{column}[{i}]") for i, turn in enumerate(require_list(value, column))]


def _convert_turn(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{name} is not an object but {json_type(turn)}", "wrong-type")
    if "role" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            raise RowError(f"{name} has no {key!r}{nearest(key, turn)}", "missing-key")
        if not isinstance(turn[key], str):
            raise RowError(f"{name}.{key} is not a string but {json_type(turn[key])}", "wrong-type")
    speaker, rest = turn["from"], {k: v for k, v in turn.items() if k not in ("from", "value")}
    if speaker not in SHAREGPT_ROLES:
        known = f"{nearest(speaker, SHAREGPT_ROLES)} (known: {format_names(SHAREGPT_ROLES, most=20)})"
        raise RowError(f"{name} is from the unknown {speaker!r}{known}", "unknown-role")
    if speaker == "function_call":
        calls = parse_json(turn["value"], f"{name}.value", "bad-tool-call")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": SHAREGPT_ROLES[speaker], "content": turn["value"], **rest}


def require_assistant(messages: Messages) -> None:
    """Raise RowError if no message is the assistant's."""
    if not any(m["role"] == "assistant" for m in messages):
        roles = format_names(m["role"] for m in messages) or "none"
        raise RowError(
            f"has no assistant turn, so there is nothing to learn (roles here: {roles})", "no-assistant-turn"
        )


def require_list(value: Any, name: str) -> list[Any]:
    """Return a list; tables of text hold lists as JSON.

    Raises:
        RowError: it is not a list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name!r} is not a list but {json_type(value)}", "wrong-type")
    return value


def require_text(value: Any, name: str, *, allow_empty: bool = False) -> str:
    """Return a text.

    Raises:
        RowError: it is not a text, is blank, or contains half of a character.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string but {json_type(value)}", "wrong-type")
    if not allow_empty and not value.strip():
        raise RowError(f"{name} is empty", "empty-content")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise RowError(f"{name} contains half of a character (a lone \\ud8xx or \\udcxx escape)", "half-character")
    return value


def parse_json(value: str, name: str, code: str = "bad-json") -> Any:
    """Return the value of a JSON text.

    Raises:
        RowError: it does not parse.
    """
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{name} does not parse as JSON: {value[:80]}", code) from error


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
