"""Validation of the messages of one row: `parse_messages_and_train_mask` returns the form of core/data/messages.py.

Tool arguments may be an object or JSON text. Content may be a list of text parts; they are joined without a separator,
as templates that take such a list join them. A message may have a `weight` (1: learned, 0: not); it is returned apart
and never reaches a template. An unknown key is an error, because it would change the text of the turn or be lost.
"""

import json
import re
import shlex
from collections import Counter
from typing import Any

from ..core.data.messages import REASONING_KEYS, Message, Messages, RowError, ToolCall
from ..core.foundation.json_results import JsonObject
from ..errors import format_names, suggest

MAX_DEPTH = 100
"""Most levels of lists and objects in a tool or its arguments."""
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff"
)
INVISIBLE = re.compile(f"[{_INVISIBLE}]")
"""Characters that most programs do not show: joiners, marks of direction, variation selectors, blanks as letters."""
_VISIBLE = re.compile(rf"[^\s{_INVISIBLE}]")
MESSAGE_KEYS = {
    "system": ("role", "content", "weight"),
    "developer": ("role", "content", "weight"),
    "user": ("role", "content", "weight"),
    "assistant": ("role", "content", "tool_calls", "weight", *REASONING_KEYS),
    "tool": ("role", "content", "name", "tool_call_id", "weight"),
}


def parse_messages_and_train_mask(
    value: Any, column: str = "messages", *, require_trained_turn: bool = True
) -> tuple[Messages, tuple[bool, ...]]:
    """Return validated messages, and for each whether the model learns it; raise RowError for the first error.

    `value` may be JSON text. `require_trained_turn` requires an assistant turn that is learned.
    """
    given = [(f"{column}[{i}]", message) for i, message in enumerate(parse_list_or_json_array(value, column))]
    messages = [_validate_message(message, name) for name, message in given]
    learned = tuple(_is_learned(message, name) for name, message in given)
    if require_trained_turn and not any(learned):
        if not any(m["role"] == "assistant" for m in messages):
            roles = format_names(m["role"] for m in messages) or "none"
            cause = f"has no assistant turn, so there is nothing to learn (roles here: {roles})"
            raise RowError(cause, "no-assistant-turn")
        raise RowError("every assistant turn has weight 0, so there is nothing to learn", "nothing-to-learn")
    return messages, learned


def _validate_message(message: Any, name: str) -> Message:
    if isinstance(message, dict) and "from" in message and "role" not in message:
        hint = f"read them as ShareGPT's: --format sharegpt --column conversations={name.partition('[')[0]}"
        raise RowError(f"{name} has 'from' in place of 'role'", "missing-key", hint)
    require_strings(message, ("role",), name)
    role, calls = message["role"], message.get("tool_calls")
    if isinstance(message.get("content"), list):
        message = {**message, "content": _join_parts(message["content"], f"{name}.content")}
    if role != "assistant" or not calls or message.get("content") is not None:  # calls need no text
        require_strings(message, ("content",), name)
    if role not in MESSAGE_KEYS:
        known = f"{suggest(role, MESSAGE_KEYS)} (known: {format_names(MESSAGE_KEYS)})"
        raise RowError(f"{name} has the unknown role {role!r}{known}", "unknown-role")
    if unknown := [k for k, v in message.items() if k not in MESSAGE_KEYS[role] and v not in (None, "", [], {})]:
        column = name.partition("[")[0]
        flags = " ".join(f"--ignore-columns {shlex.quote(f'{column}.{key}')}" for key in unknown)
        instead = "put what they say into the content"
        if "train" in unknown or "loss" in unknown:
            instead = "say by a 'weight' of 1 or 0 whether a turn is learned"
        hint = f"{instead}, or leave them out: {flags} (data.ignore_columns)"
        known = f"(known: {format_names(MESSAGE_KEYS[role])})"
        raise RowError(f"{name} has keys that are not used: {format_names(unknown)} {known}", "unknown-key", hint)
    content = message.get("content") or ""
    if is_blank(content) and not calls and role != "tool":  # a tool may return an empty text
        raise RowError(f"{name} ({role}) has empty content", "empty-content")
    valid = {"role": role, "content": require_text(content, f"{name} ({role})", allow_empty=True)}
    if calls is not None and calls != []:
        found = enumerate(parse_list_or_json_array(calls, f"{name}.tool_calls"))
        valid["tool_calls"] = [_validate_tool_call(call, f"{name}.tool_calls[{i}]") for i, call in found]
    for key in ("name", "tool_call_id", *REASONING_KEYS):
        if key in message and message[key] not in (None, ""):
            valid[key] = require_text(message[key], f"{name}.{key}")
    return valid


def _join_parts(parts: list[Any], name: str) -> str:
    """Return the text of OpenAI's list of content parts; raise RowError for a part that is not text."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            cause = f"{name}[{i}] is a part of the type {part['type']!r}, and only text is learned"
            raise RowError(cause, "not-text", "remove such rows, or say in a text part what it shows")
        require_strings(part, ("text",), f"{name}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def _validate_tool_call(call: Any, name: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowError(f"{name} is not an object but {get_json_type_name(function)}", "bad-tool-call")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{name} names no function{suggest('name', function)}", "bad-tool-call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json_cell(arguments or "{}", f"{name}.arguments", "bad-tool-call")
    if not isinstance(arguments, dict):
        raise RowError(f"{name}.arguments is not an object but {get_json_type_name(arguments)}", "bad-tool-call")
    require_limited_json_depth(arguments, f"{name}.arguments")
    valid = ToolCall(type="function", function={"name": function["name"], "arguments": arguments})
    if call.get("id") is not None:
        valid["id"] = require_text(call["id"], f"{name}.id")
    return valid


def _is_learned(message: Message, name: str) -> bool:
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return role == "assistant"
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{name}.weight is {weight!r}: a turn is learned (1) or not (0)", "bad-weight")
    if weight == 1 and role != "assistant":
        raise RowError(f"{name}.weight is 1, but a {role} turn is never learned", "bad-weight")
    return bool(weight)


def require_strings(value: Any, keys: tuple[str, ...], name: str) -> None:
    """Raise RowError if a value is not an object, or one of these keys is missing or not a string."""
    if not isinstance(value, dict):
        raise RowError(f"{name} is not an object but {get_json_type_name(value)}", "wrong-type")
    for key in keys:
        if key not in value:
            raise RowError(f"{name} has no {key!r}{suggest(key, value)}", "missing-key")
        if not isinstance(value[key], str):
            raise RowError(f"{name}.{key} is not a string but {get_json_type_name(value[key])}", "wrong-type")


def parse_list_or_json_array(value: Any, name: str) -> list[Any]:
    """Return a list, which may be given as JSON text as in a CSV file; raise RowError for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json_cell(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name!r} is not a list but {get_json_type_name(value)}", "wrong-type")
    return value


def is_blank(text: str) -> bool:
    """Return whether a text has no character that a reader sees."""
    return _VISIBLE.search(text) is None


def require_text(value: Any, name: str, *, allow_empty: bool = False) -> str:
    """Return a text; raise RowError if it is not a text, is blank, or contains half of a character."""
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string but {get_json_type_name(value)}", "wrong-type")
    if not allow_empty and is_blank(value):
        raise RowError(f"{name} is empty", "empty-content")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise RowError(f"{name} contains half of a character (a lone \\ud8xx or \\udcxx escape)", "half-character")
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):  # json.loads would keep the last one
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowError(f"has the key {name[:80]!r} twice in one object", "duplicate-key")
    return found


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_make_object)
"""Decodes JSON; raises RowError for a key that is given twice."""


def decode_json_without_duplicate_keys(text: str) -> Any:
    """Return the value of a JSON text; exceptions are those of `STRICT_JSON.decode`, which is slower."""
    try:
        value, end = STRICT_JSON.raw_decode(text)
    except RowError:
        raise
    except ValueError:
        return STRICT_JSON.decode(text)
    return value if text[end:] in ("", "\n") else STRICT_JSON.decode(text)


def require_limited_json_depth(value: Any, name: str) -> None:
    """Raise RowError if lists and objects are nested so deep that a template or another process could not take them."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [v.values() if type(v) is dict else v for v in level if type(v) is dict or type(v) is list]
        if not containers:
            return
        level = [child for container in containers for child in container]
    raise RowError(f"{name} is nested more than {MAX_DEPTH} deep", "too-deep")


def parse_json_cell(text: str, name: str, error_code: str = "bad-json") -> Any:
    """Return the value of a JSON text; raise RowError if it does not parse."""
    try:
        return decode_json_without_duplicate_keys(text)
    except RowError as error:
        raise RowError(f"{name} {error}", error.code) from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} does not parse as JSON: {text[:80]}", error_code) from error


def get_json_type_name(value: Any) -> str:
    """Return the name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
