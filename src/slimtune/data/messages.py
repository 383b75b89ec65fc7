"""A conversation's messages, checked and brought to the one form that chat templates take.

    {"role": "system" | "user", "content": str}
    {"role": "assistant", "content": str, "tool_calls": [{"type": "function", "function": {"name", "arguments"}}]}
    {"role": "tool", "content": str, "name": str, "tool_call_id": str}

Arguments are an object here, whether a file holds them so or as JSON text. A `weight` says whether a turn is learned
and never reaches a template. What does not hold is a `RowFault`; nothing is passed over.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import format_names, nearest

ROLES = ("system", "user", "assistant", "tool")
KEYS = {"assistant": ("tool_calls", "weight"), "tool": ("name", "tool_call_id", "weight")}
"""Keys a message of a role may have beside role and content; all others: `weight` alone."""
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's `from` → role; the value of a `function_call` is JSON text, a call or a list of calls."""

Messages = list[dict[str, Any]]


class RowError(ValueError):
    """What is wrong with one row.

    Args:
        cause: as a person reads it.
        code: its kind, in kebab case.
    """

    def __init__(self, cause: str, code: str) -> None:
        super().__init__(cause)
        self.code = code


def conversation(value: Any, name: str = "messages", *, learns: bool = True) -> tuple[Messages, tuple[bool, ...]]:
    """Return checked messages and for each whether it is to be learned.

    Args:
        value: a list of messages, or one as JSON text.
        name: of the column, for messages.
        learns: whether there has to be an assistant turn.

    Raises:
        RowFault: the first thing that does not hold.
    """
    items = listing(value, name)
    checked = [_message(message, f"{name}[{i}]") for i, message in enumerate(items)]
    messages = [message for message, _ in checked]
    if learns:
        require_assistant(messages)
    weights = tuple(weight for _, weight in checked)
    if learns and not any(weights):
        raise RowError("every assistant turn has weight 0, so there is nothing to learn", "nothing-to-learn")
    return messages, weights


def from_sharegpt(value: Any, name: str = "conversations") -> Messages:
    """Return a ShareGPT conversation (`from`, `value`) as unchecked messages; those that have a role stay as they are.

    Raises:
        RowFault: a turn has neither, or an unknown speaker.
    """
    return [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(listing(value, name))]


def require_assistant(messages: Messages) -> None:
    """Raise RowFault where no assistant speaks."""
    if not any(m["role"] == "assistant" for m in messages):
        roles = format_names(m["role"] for m in messages) or "none"
        raise RowError(
            f"has no assistant turn, so there is nothing to learn (roles here: {roles})", "no-assistant-turn"
        )


def listing(value: Any, name: str) -> list[Any]:
    """Return a column's list, which tables of text hold as JSON.

    Raises:
        RowFault: it is none.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name!r} is not a list but {kind(value)}", "wrong-type")
    return value


def text(value: Any, name: str, *, empty: bool = False) -> str:
    """Return a text, checked.

    Raises:
        RowFault: it is no text, blank (unless `empty` says it may be), or holds half of a character.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string but {kind(value)}", "wrong-type")
    if not empty and not value.strip():
        raise RowError(f"{name} is empty", "empty-content")
    whole(value, name)
    return value


def whole(value: str, name: str) -> None:
    """Raise RowFault where a text holds half of a character."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise RowError(f"{name} holds half of a character (a lone \\ud8xx or \\udcxx escape)", "half-character")


def kind(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _message(message: Any, name: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(message, dict):
        raise RowError(f"{name} is not an object but {kind(message)}", "wrong-type")
    role, calls = message.get("role"), message.get("tool_calls")
    for key in ("role", "content"):
        if key == "content" and role == "assistant" and calls and message.get(key) is None:
            continue  # it calls, and says nothing
        if key not in message:
            raise RowError(f"{name} has no {key!r}{nearest(key, message)}", "missing-key")
        if not isinstance(message[key], str):
            raise RowError(f"{name}.{key} is not a string but {kind(message[key])}", "wrong-type")
    known = ("role", "content", *KEYS.get(str(role), ("weight",)))
    # An unknown key would never reach the model, or change what the template makes of the turn: neither silently.
    if len(message) > 2 and (unknown := [k for k in message if k not in known and message[k] is not None]):
        raise RowError(
            f"{name} has keys that are not used: {format_names(unknown)} (known: {format_names(known)})", "unknown-key"
        )
    if role not in ROLES:
        raise RowError(
            f"{name} has the unknown role {role!r}{nearest(str(role), ROLES)} (known: {format_names(ROLES)})",
            "unknown-role",
        )
    content = message.get("content") or ""
    if not content.strip() and not calls and role != "tool":  # a tool may well have nothing to say
        raise RowError(f"{name} ({role}) has empty content", "empty-content")
    whole(content, f"{name} ({role})")
    made: dict[str, Any] = {"role": role, "content": content}
    if calls is not None and calls != []:
        made["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if message.get(key) is not None:
            made[key] = text(message[key], f"{name}.{key}")
    return made, _weight(message.get("weight"), role, name)


def _weight(value: Any, role: str, name: str) -> bool:
    if value is None:
        return role == "assistant"
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError(f"{name}.weight is {value!r}: a turn is learned (1) or not (0), nothing between", "bad-weight")
    if value == 1 and role != "assistant":
        raise RowError(f"{name}.weight is 1, but a {role} turn is never learned", "bad-weight")
    return bool(value)


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    return [_call(call, f"{name}[{i}]") for i, call in enumerate(listing(value, name))]


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowError(f"{name} is not an object but {kind(function)}", "bad-tool-call")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{name} names no function{nearest('name', function)}", "bad-tool-call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{name}.arguments", "bad-tool-call")
    if not isinstance(arguments, dict):
        raise RowError(f"{name}.arguments is not an object but {kind(arguments)}", "bad-tool-call")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        made["id"] = text(call["id"], f"{name}.id")
    return made


def _turn(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{name} is not an object but {kind(turn)}", "wrong-type")
    if "role" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            raise RowError(f"{name} has no {key!r}{nearest(key, turn)}", "missing-key")
        if not isinstance(turn[key], str):
            raise RowError(f"{name}.{key} is not a string but {kind(turn[key])}", "wrong-type")
    if turn["from"] not in SPEAKERS:
        raise RowError(
            f"{name} is from the unknown {turn['from']!r}{nearest(turn['from'], SPEAKERS)} "
            f"(known: {format_names(SPEAKERS, most=20)})",
            "unknown-role",
        )
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = _json(turn["value"], f"{name}.value", "bad-tool-call")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"], **rest}


def _json(value: str, name: str, code: str = "bad-json") -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{name} does not parse as JSON: {value[:80]}", code) from error
