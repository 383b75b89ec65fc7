"""The formats: how each is recognized by its columns, what a row becomes, what an invalid row says, what is learned."""

import json
import re
from pathlib import Path

import pytest
from row_files import write_jsonl
from tiny_tokenizer import CHATML, GPT_OSS, make_tokenizer, template_text
from tiny_tokenizer import SMOLLM2_TOK as TOK
from tokenizers.processors import TemplateProcessing

from slimtune.core.data.rows import InvalidRow, Row
from slimtune.core.data.tokenize import tokenize_dataset, tokenize_rows_with_errors
from slimtune.core.data.tokenized_dataset import list_tokens_and_labels_by_row
from slimtune.errors import DataError, ModelError, UsageError
from slimtune.extras.row_columns import load_row_formats, parse_row_or_error
from slimtune.extras.row_files import MAX_COLUMN_SETS, open_rows, read_rows

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A lie."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
THUMB = {"q": "Say", "a": "A", "thumb": "up"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def write(path, *rows):
    return write_jsonl(path, rows)


def read_one(tmp_path, row, **options):
    file = open_rows(write(tmp_path / "a.jsonl", row), **options)
    (found,) = file
    return file.format, found


GOOD = {
    "chat": ({"messages": [USER, SAID]}, Row([USER, SAID], 1)),
    "chat of text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"},
        {"type": "text", "text": "i"}]}, {**SAID, "annotations": [], "refusal": None}]}, Row([USER, SAID], 1)),
    "chat as JSON text": ({"messages": json.dumps([USER, SAID])}, Row([USER, SAID], 1)),
    "instruction": ({"instruction": "Say", "output": "A"}, Row([{"role": "user", "content": "Say"},
        {"role": "assistant", "content": "A"}], 1)),
    "instruction with input and system": ({"instruction": "Say", "input": "it", "output": "A", "system": "S"},
        Row([{"role": "system", "content": "S"}, {"role": "user", "content": "Say\n\nit"},
             {"role": "assistant", "content": "A"}], 1)),
    "instruction with nothing beside": ({"instruction": "Say", "input": "", "output": "A", "system": None},
        Row([{"role": "user", "content": "Say"}, {"role": "assistant", "content": "A"}], 1)),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A lie."}]},
        Row([USER, SAID], 1)),
    "sharegpt with system": ({"system": "S", "conversations": [{"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "A lie."}]}, Row([{"role": "system", "content": "S"}, USER, SAID], 1)),
    "sharegpt with roles": ({"conversations": [USER, SAID]}, Row([USER, SAID], 1)),
    "sharegpt with calls": ({"conversations": [{"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "A lie."}]},
        Row([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, SAID],
            1)),
    "prompt-completion": ({"prompt": "Once", "completion": " upon"}, Row([], 1, prompt="Once", completion=" upon")),
    "prompt-completion of messages": ({"prompt": [USER, SAID, USER], "completion": [SAID]},
        Row([USER, SAID, USER, SAID], 1, learned=(False, False, False, True))),
    "text": ({"text": "Once upon"}, Row([], 1, completion="Once upon")),
    "preference": ({"prompt": "Q", "chosen": "a", "rejected": "b"},
        Row([{"role": "user", "content": "Q"}], 1, chosen="a", rejected="b")),
    "preference of messages": ({"prompt": [USER], "chosen": [SAID], "rejected": [SAID]},
        Row([USER], 1, chosen=[SAID], rejected=[SAID])),
    "chat with weights": ({"messages": [USER, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1}]},
        Row([USER, SAID, USER, SAID], 1, learned=(False, False, False, True))),
    "chat with tools": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "123456789", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "2", "name": "f", "tool_call_id": "123456789"}, SAID],
        "tools": json.dumps([{"name": "f", "parameters": {}}])},
        Row([USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "123456789"}]},
             {"role": "tool", "content": "2", "name": "f", "tool_call_id": "123456789"}, SAID], 1, tools=[TOOL])),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_row(tmp_path, name):
    row, expected = GOOD[name]
    assert read_one(tmp_path, {"id": 7, **row}) == (name.split()[0], expected)
    assert read_one(tmp_path, row, format=name.split()[0])[1] == expected


def turn(**more):
    return {"messages": [USER, {**SAID, **more}]}


INVALID = {
    "messages wrong": ({"messages": "hi"}, "wrong-type", "'messages' is not a list but a string"),
    "no turns": ({"messages": []}, "no-assistant-turn", "so there is nothing to learn (roles here: none)"),
    "no assistant": ({"messages": [USER]}, "no-assistant-turn", "so there is nothing to learn (roles here: 'user')"),
    "message wrong": ({"messages": ["hi"]}, "wrong-type", "messages[0] is not an object but a string"),
    "role missing": ({"messages": [{"content": "a"}]}, "missing-key", "messages[0] has no 'role'"),
    "content missing": ({"messages": [{"role": "user", "contents": ""}]}, "missing-key", "did you mean 'contents'?"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "wrong-type", "not a string but null"),
    "calls of a user": ({"messages": [{**USER, "tool_calls": [1]}]}, "unknown-key", "(known: 'role', 'content'"),
    "weight between": (turn(weight=0.5), "bad-weight", "messages[1].weight is 0.5: a turn is learned (1) or not (0)"),
    "weight of a user": ({"messages": [{**USER, "weight": 1}, SAID]}, "bad-weight", "a user turn is never learned"),
    "all weights 0": (turn(weight=0), "nothing-to-learn", "every assistant turn has weight 0"),
    "call without name": (turn(tool_calls=[{"function": {"nme": "f"}}]), "bad-tool-call", "did you mean 'nme'?"),
    "arguments not JSON": (turn(tool_calls=[{"name": "f", "arguments": "{"}]), "bad-tool-call", "not parse as JSON: {"),
    "arguments a list": (turn(tool_calls=[{"name": "f", "arguments": [1]}]), "bad-tool-call", "an object but a list"),
    "nameless tool": ({**turn(), "tools": [{"type": "function"}]}, "bad-tool", "tools[0] is not the JSON schema"),
    "empty content": (turn(content=" "), "empty-content", "messages[1] (assistant) has empty content"),
    "invisible content": (turn(content="\u200b \ufeff"), "empty-content", "messages[1] (assistant) has empty content"),
    "invisible completion": ({"prompt": "a", "completion": "\u2060"}, "empty-content", "'completion' is empty"),
    "unknown role": (turn(role="asistant"), "unknown-role", "did you mean 'assistant'?"),
    "unknown key": (turn(nme="x"), "unknown-key", "messages[1] has keys that are not used: 'nme'"),
    "image part": (turn(content=[{"type": "image_url"}]), "not-text", "content[0] is a part of the type 'image_url'"),
    "part without text": (turn(content=[{"type": "text", "txt": "a"}]), "missing-key", "did you mean 'txt'?"),
    "loss of a turn": (turn(loss=False), "unknown-key", "keys that are not used: 'loss'"),
    "unknown speaker": ({"conversations": [{"from": "humn", "value": "a"}]}, "unknown-role", "did you mean 'human'?"),
    "no speaker": ({"conversations": [{"form": "human", "value": "a"}]}, "missing-key", "did you mean 'form'?"),
    "two texts": ({"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "unknown-key", "a 'content'"),
    "sharegpt alone": ({"conversations": [{"from": "human", "value": "a"}]}, "no-assistant-turn", "here: 'user')"),
    "empty output": ({"instruction": "a", "output": ""}, "empty-content", "'output' is empty"),
    "number": ({"instruction": 3, "output": "a"}, "wrong-type", "'instruction' is not a string but a number"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "empty-content", "'completion' is empty"),
    "text and list": ({"prompt": "a", "completion": [SAID]}, "wrong-type", "wanted two texts or two lists"),
    "half a character": ({"text": "\ud83d"}, "half-character", "contains half of a character"),
    "preference of users": ({"chosen": [USER], "rejected": [SAID]}, "no-assistant-turn", "no assistant turn"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_row(tmp_path, name):
    row, code, cause = INVALID[name]
    _, found = read_one(tmp_path, row)
    assert (type(found), found.line, found.code) == (InvalidRow, 1, code)
    assert cause in found.cause


def test_missing_column_of_a_later_row(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a", "outptu": "b"})
    cause = "has no 'output'; did you mean 'outptu'? (keys here: 'instruction', 'outptu')"
    assert list(open_rows(path))[1] == InvalidRow(2, cause, "missing-column")


def test_unused_columns_are_counted(tmp_path):
    rows = [{"id": 1, "text": "a", "Label": 0, "meta": None}, {"id": 2, "text": "b", "Label": 1}, {"text": "c"}]
    file = open_rows(write(tmp_path / "a.jsonl", *rows))
    assert len(list(file)) == len(list(file)) == 3  # counted anew each time
    assert [(c.name, c.row_count, c.line, bool(c.effect_of_missing)) for c in file.unused_columns] == [
        ("id", 2, 1, False),
        ("Label", 2, 1, True),
    ]
    assert file.columns == ["text"]
    with pytest.raises(DataError, match="'Label'") as error:
        read_rows(file.path)
    assert "--ignore-columns Label" in error.value.hint
    assert len(read_rows(file.path, ignore_columns=["Label"])) == 3


def test_a_column_to_leave_out_that_no_row_has(tmp_path):
    file = open_rows(write(tmp_path / "a.jsonl", {"text": "a", "id": 1}), ignore_columns=["idd", "id", "messages.id"])
    assert len(list(file)) == 1
    assert file.missing_ignored_columns == ["idd"]


def test_rows_with_many_columns_take_little_memory(tmp_path):
    rows = [{"text": "a", f"column {i}": i} for i in range(2 * MAX_COLUMN_SETS)]
    file = open_rows(write(tmp_path / "a.jsonl", *rows, {"text": "a", "score": 1}))
    assert len(list(file)) == len(rows) + 1
    assert len(file.unused_columns) == MAX_COLUMN_SETS + 1
    assert [c.name for c in file.lossy_columns] == ["score"]


def test_messages_of_sharegpt_get_the_flags_that_work(tmp_path):
    row = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A lie."}]}
    _, found = read_one(tmp_path, row)
    assert found.hint.endswith("--format sharegpt --column conversations=messages")
    assert read_one(tmp_path, row, format="sharegpt", columns={"conversations": "messages"})[1].messages == [USER, SAID]


def test_a_later_file_of_a_folder_has_another_column(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "b.jsonl", {"text": "b", "images": []}, {"text": "c", "images": ["x.png"]})
    with pytest.raises(DataError, match="'images'"):
        read_rows(tmp_path)


def test_ignored_columns_are_as_if_they_were_not_there(tmp_path):
    row = {"messages": [{**USER, "name": "Ann"}, {**SAID, "id": 3}], "text": "x"}
    path = write(tmp_path / "a.jsonl", row)
    ignored = ["messages.name", "messages.id", "text"]
    assert read_rows(path, ignore_columns=ignored) == [Row([USER, SAID], 1)]
    path = write(tmp_path / "a.jsonl", {"messages": json.dumps(row["messages"])})  # as in a CSV file
    assert read_rows(path, ignore_columns=ignored) == [Row([USER, SAID], 1)]
    path = write(tmp_path / "a.jsonl", {"messages": [USER, {**SAID, "thinking": "Hm.", "weight": 0}]})
    assert read_rows(path, ignore_columns=["messages.thinking", "messages.weight"]) == [Row([USER, SAID], 1)]
    tool = {"role": "tool", "content": "2", "name": "f"}
    path = write(tmp_path / "a.jsonl", {"messages": [USER, SAID, tool, SAID]})
    assert read_rows(path, ignore_columns=ignored)[0].messages[2] == tool  # a tool's name is used


def test_text_that_repeats_the_other_columns_is_not_used(tmp_path):
    text = "### Instruction:\nSay\n\n### Input:\nit\n\n### Response:\nA"
    alpaca = {"instruction": "Say", "input": "it", "output": "A", "text": text}
    assert read_one(tmp_path, alpaca)[0] == "instruction"
    assert read_one(tmp_path, {"messages": [USER, SAID], "text": "Hi: A lie."})[0] == "chat"


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"prompt": "a", "response": "b"}, ["--format instruction --column instruction=prompt --column output=response",
                                            "--format prompt-completion --column completion=response"]),
        ({"instruction": "a", "context": "c", "response": "b", "category": "d"},
         ["--format instruction --column output=response --column input=context"]),
        ({"Question": "a", "Answer": "b"},
         ["--format instruction --column instruction=Question --column output=Answer"]),
        ({"the chat": 1, "dialog": [USER, SAID]}, ["--format chat --column messages=dialog"]),
        ({"content": "a"}, ["--format text --column text=content"]),
    ],
)  # fmt: skip
def test_unknown_columns_get_flags_that_work(tmp_path, row, flags):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError) as error:
        open_rows(path)
    assert re.findall(r"--format[^(,]*[^(, ]", error.value.hint) == flags
    assert "did you mean" not in error.value.message
    for flag in flags:
        _, format, *columns = flag.replace("--column ", "").split()
        (found,) = read_rows(path, format=format, columns=dict(pair.split("=") for pair in columns))
        assert found.messages or found.completion


def test_ambiguous_columns_need_a_format(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "input": "", "output": "b", "text": "c"})
    with pytest.raises(DataError, match=r"\binstruction\b.*\btext\b.*'instruction', 'input'") as error:
        open_rows(path)
    assert "--format instruction" in error.value.hint
    assert read_rows(path, format="text") == [Row([], 1, completion="c")]


def test_unknown_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"dialog": [USER, SAID], "converstions": []})
    with pytest.raises(DataError, match="'dialog', 'converstions'") as error:
        open_rows(path)
    assert re.search("'conversations'.*'converstions'", error.value.message)
    assert all(f"{name}: {', '.join(f.required)}" in error.value.expected for name, f in load_row_formats().items())


def test_renamed_columns(tmp_path):
    row = {"dialog": [USER, SAID], "messages": "of the house"}
    assert read_one(tmp_path, row, columns={"messages": "dialog"}) == ("chat", Row([USER, SAID], 1))
    columns = {"instruction": "question", "output": "text"}
    format, found = read_one(tmp_path, {"question": "Say", "text": "A"}, columns=columns)
    assert (format, found.messages[1]["content"]) == ("instruction", "A")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"messages": "dialgo"}}, "--column messages=dialgo: .*; did you mean 'dialog'?"),
        ({"columns": {"messages": "dialgo"}, "format": "chat"}, "has no column 'dialgo'"),
        ({"columns": {"mesages": "dialog"}}, "not a column of any format; did you mean 'messages'?"),
        ({"columns": {"text": "dialog"}, "format": "chat"}, "not a column of the format chat"),
        ({"format": "chatt"}, "no data format 'chatt'; did you mean 'chat'?"),
    ],
)
def test_wrong_format_or_column(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        read_one(tmp_path, {"dialog": [USER, SAID]}, **options)


@pytest.mark.parametrize(
    ("row", "columns", "format"),
    [
        (THUMB, {"prompt": "q", "completion": "a", "label": "thumb"}, "unpaired-preference"),
        ({"mail": "Say", "kind": "order"}, {"text": "mail", "label": "kind"}, "classification"),
        (THUMB, {"prompt": "q", "completion": "a"}, "prompt-completion"),
    ],
)
def test_every_column_that_is_named_is_read(tmp_path, row, columns, format):
    assert read_one(tmp_path, row, columns=columns)[0] == format


def supervised_text(row, train_on="assistant", tokenizer=TOK):
    (tokens,) = tokenize_rows_with_errors([row], tokenizer, train_on=train_on)
    pairs = zip(tokens.input_ids, tokens.supervised, strict=True)
    return tokenizer.decode([token for token, supervised in pairs if supervised])


def test_text_is_learned_whole_and_prompt_is_not():
    assert supervised_text(Row([], 1, completion="Once upon a time")) == "Once upon a time<|im_end|>"
    assert supervised_text(Row([], 1, prompt="Once upon", completion=" a time")) == " a time<|im_end|>"


def test_first_token_of_the_tokenizer_is_not_learned():
    tok = make_tokenizer(None, CHATML)
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tok.bos_token_id)]
    )
    (tokens,) = tokenize_rows_with_errors([Row([], 1, completion="A lie.")], tok)
    assert tokens.input_ids == [*tok("A lie.")["input_ids"], tok.eos_token_id]
    assert tokens.supervised == [False] + [True] * (len(tokens.input_ids) - 1)


def test_text_needs_an_end_of_text_token():
    tok = make_tokenizer(None, CHATML)
    tok.eos_token = None
    with pytest.raises(ModelError, match="end-of-text"):
        tokenize_rows_with_errors([Row([], 1, completion="A lie.")], tok)


@pytest.mark.parametrize("template", ["smollm2", "qwen3_training"])
def test_weights_and_train_on_choose_the_turns(template):
    tok = make_tokenizer(template_text(template), CHATML)
    think = "<think>\n\n</think>\n\n" if template == "qwen3_training" else ""
    one, two, three = (f"{think}{n}.<|im_end|>" for n in ("One", "Two", "Three"))
    turns = [turn for said in ("One.", "Two.", "Three.") for turn in (USER, {**SAID, "content": said})]
    first_and_last, first_two = (False, True, False, False, False, True), (False, True, False, True, False, False)
    assert supervised_text(Row(turns, 1), tokenizer=tok) == one + two + three
    assert supervised_text(Row(turns, 1), "last_assistant", tok) == three
    assert supervised_text(Row(turns, 1, learned=first_and_last), tokenizer=tok) == one + three
    assert supervised_text(Row(turns, 1, learned=first_two), "last_assistant", tok) == ""


@pytest.mark.parametrize(
    ("template", "specials", "key", "learned"),
    [
        ("qwen3", CHATML, "reasoning_content", "<think>\nHm.\n</think>\n\nA lie.<|im_end|>"),
        ("gptoss", GPT_OSS, "thinking", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
                                        "<|channel|>final<|message|>A lie.<|return|>"),
    ],
)  # fmt: skip
def test_reasoning_is_learned_where_the_template_reads_it(template, specials, key, learned):
    tok = make_tokenizer(template_text(template), specials)
    row = parse_row_or_error({"messages": [USER, {**SAID, key: "Hm."}]}, "chat", 1)
    assert supervised_text(row, tokenizer=tok) == learned
    row = parse_row_or_error({"messages": [USER, {**SAID, key: "Ah."}, USER, SAID]}, "chat", 1)
    (refused,) = tokenize_rows_with_errors([row], tok)  # both templates leave out what earlier turns thought
    assert repr(key) in refused.cause


@pytest.mark.parametrize(
    ("template", "row", "hint"),
    [
        ("smollm2", turn(thinking="Hm."), "<think>…</think>, or leave it out: --ignore-columns messages.thinking"),
        ("qwen3", turn(thinking="Hm."), "rename it to 'reasoning_content'"),
        ("smollm2", {"messages": [{"role": "developer", "content": "Be brief."}, USER, SAID]}, "call it 'system'"),
    ],
)
def test_keys_that_the_template_does_not_read(template, row, hint):
    (refused,) = tokenize_rows_with_errors(
        [parse_row_or_error(row, "chat", 1)], make_tokenizer(template_text(template), CHATML)
    )
    assert (type(refused), refused.code) == (InvalidRow, "template-leaves-out")
    assert hint in refused.hint


def test_developer_message_of_a_template_that_knows_it():
    tok = make_tokenizer(template_text("gptoss"), GPT_OSS)
    row = parse_row_or_error({"messages": [{"role": "developer", "content": "Be brief."}, USER, SAID]}, "chat", 1)
    (tokens,) = tokenize_rows_with_errors([row], tok)
    assert "<|start|>developer<|message|># Instructions\n\nBe brief." in tok.decode(tokens.input_ids)


YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
PAIRS = {
    "text": ({"prompt": USER["content"], "chosen": "yes", "rejected": "no"}, None, "yes"),
    "implicit text": ({"chosen": "Q: so yes", "rejected": "Q: so no"}, "Q: so", " yes"),
    "messages": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, None, "yes"),
    "implicit messages": ({"chosen": [USER, YES], "rejected": [USER, NO]}, None, "yes"),
    "prompt repeated": ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, None, "yes"),
    "text beside messages": ({"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]}, None, "yes"),
    "text after messages": ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, None, "yes"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_pair_is_two_rows(tmp_path, name):
    record, prompt, answer = PAIRS[name]
    path = write(tmp_path / "a.jsonl", record)
    (example,) = tokenize_dataset(open_rows(path), TOK, max_seq_len=99, source_path=path)[0]
    (chosen, labels), (rejected, _) = list_tokens_and_labels_by_row(example)
    expected = [{"messages": [USER, turn]} for turn in (YES, NO)]
    if prompt is not None:
        expected = [{"prompt": prompt, "completion": a} for a in (answer, answer.replace("yes", "no"))]
    alone = [
        tokenize_rows_with_errors(read_rows(write(tmp_path / f"{i}.jsonl", row)), TOK)[0]
        for i, row in enumerate(expected)
    ]
    assert [chosen, rejected] == [row.input_ids for row in alone]
    assert labels == [t if on else -100 for t, on in zip(alone[0].input_ids, alone[0].supervised, strict=True)]


def test_pair_without_a_difference(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*chosen.*rejected"):
        tokenize_dataset(open_rows(path), TOK, max_seq_len=99, source_path=path)


def test_examples_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    seen = set()
    for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL):
        for row in [block] if block.startswith('{"tools"') else block.splitlines():
            named = {}
            if '"label"' in row:
                named = {"format": "unpaired-preference" if '"completion"' in row else "classification"}
            format, found = read_one(tmp_path, json.loads(row), **named)
            seen.add(format)
            assert found.chosen or found.answers or found.tools or found.labels or supervised_text(found)
    assert seen == {*load_row_formats()} - {"document", "prompt"}
