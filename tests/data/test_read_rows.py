"""Reading chat rows: what a good file gives, and the message and exit code of each bad one."""

from __future__ import annotations

import json

import pytest

from slimtune.data.dataset import Row, read_rows
from slimtune.errors import DataError, UsageError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Größe 🙂"}]}


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def turns(*pairs):
    return {"messages": [{"role": r, "content": c} for r, c in pairs]}


def test_good_file_keeps_lines_and_order(tmp_path):
    three = turns(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(GOOD), "", {**three, "id": 7}, "  ")
    assert read_rows(path) == [Row(GOOD["messages"], 1), Row(three["messages"], 3)]
    (tmp_path / "crlf.jsonl").write_bytes(f"{json.dumps(GOOD)}\r\n".encode())
    assert read_rows(str(tmp_path / "crlf.jsonl")) == [Row(GOOD["messages"], 1)]


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UsageError, match=r"no such file: .*trian\.jsonl; did you mean 'train\.jsonl'") as fault:
        read_rows(tmp_path / "trian.jsonl")
    assert fault.value.exit_code == 2
    with pytest.raises(UsageError, match="there is no folder"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_empty_file(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match="is empty") as fault:
        read_rows(tmp_path / "a.jsonl")
    assert fault.value.exit_code == 1
    assert '{"messages"' in str(fault.value)


def test_line_that_does_not_parse_shows_file_line_and_text(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, '{"messages": [oops' + "x" * 200)
    with pytest.raises(DataError) as fault:
        read_rows(path)
    assert f"{path}:2: does not parse as JSON (Expecting value at column 15)" in str(fault.value)
    assert '{"messages": [oopsxxx' in str(fault.value)
    assert "… (218 characters)" in str(fault.value)
    assert "x" * 80 not in str(fault.value)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: is not UTF-8 at byte 14"):
        read_rows(tmp_path / "a.jsonl")


FAULTY = {
    "array": ("[1, 2]", "is not a JSON object but a list"),
    "other keys": ({"message": []}, "has no 'messages'; did you mean 'message'? (keys here: 'message')"),
    "messages wrong": ({"messages": "hi"}, "'messages' is not a list but a string"),
    "no turns": ({"messages": []}, "has no assistant turn, so there is nothing to learn (roles here: none)"),
    "no assistant": (turns(("user", "a")), "has no assistant turn, so there is nothing to learn (roles here: 'user')"),
    "message wrong": ({"messages": ["hi"]}, "messages[0] is not an object but a string"),
    "role missing": ({"messages": [{"content": "a"}]}, "messages[0] has no 'role'"),
    "content missing": ({"messages": [{"role": "user", "contents": "a"}]}, "'content'; did you mean 'contents'?"),
    "role number": ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role is not a string but a number"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is not a string but null"),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content is not a string but a list",
    ),
    "unknown role": (
        turns(("user", "a"), ("asistant", "b")),
        "messages[1] has the unknown role 'asistant'; did you mean 'assistant'? (known: 'system', 'user'",
    ),
    "empty content": (turns(("user", "a"), ("assistant", " \n")), "messages[1] (assistant) has empty content"),
    "unknown key": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
        "messages[0] has keys that are not used: 'tool_calls' (known: 'role', 'content', 'weight')",
    ),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "contains half of a character"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_row_is_named_by_file_and_line(tmp_path, name):
    row, message = FAULTY[name]
    path = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    with pytest.raises(DataError) as fault:
        read_rows(path)
    assert f"{path}:2: " in str(fault.value)
    assert message in str(fault.value)
    assert fault.value.exit_code == 1


def test_faults_are_reported_together_up_to_ten(tmp_path):
    path = write(tmp_path / "a.jsonl", "{", GOOD, turns(("user", "a")), turns(("bot", "a")))
    with pytest.raises(DataError) as fault:
        read_rows(path)
    assert [f"a.jsonl:{n}:" in str(fault.value) for n in (1, 2, 3, 4)] == [True, False, True, True]
    with pytest.raises(DataError) as fault:
        read_rows(write(tmp_path / "b.jsonl", *["{"] * 15))
    assert str(fault.value).count("does not parse") == 10
    assert "the first 10 errors" in str(fault.value)
