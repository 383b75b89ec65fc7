"""Rows as examples: labels, lengths, what is dropped or cut, and that all of it is said."""

import json

import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.chat_template import encode_chat
from slimtune.data.dataset import Row
from slimtune.data.tokenize import tokenize_dataset
from slimtune.errors import DataError, ModelError, UsageError

TOK = make_tokenizer(template_text("gemma"), ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"])


def row(answer, line, role="assistant"):
    return Row([{"role": "user", "content": "Define patience."}, {"role": role, "content": answer}], line)


ROWS = [row("A lie.", 1), row("A minor form of despair, disguised as a virtue. " * 4, 2), row("Despair.", 4)]
LENGTHS = [len(encode_chat(TOK, r.messages).input_ids) for r in ROWS]


def test_labels_are_the_supervised_tokens():
    examples, report = tokenize_dataset(ROWS, TOK, max_seq_len=1000, path="a.jsonl")
    assert [e["line"] for e in examples] == [1, 2, 4]
    for one, source in zip(examples, ROWS, strict=True):
        alone = encode_chat(TOK, source.messages)
        assert one["input_ids"] == alone.input_ids
        said = [t for t in one["labels"] if t != -100]
        assert TOK.decode(said) == source.messages[1]["content"].strip() + "<end_of_turn>"
        assert all(label in (-100, token) for label, token in zip(one["labels"], one["input_ids"], strict=True))
    assert report.to_dict() == {
        "rows": 3, "kept": 3, "dropped": 0, "truncated": 0, "tokens": sum(LENGTHS),
        "supervised_tokens": sum(t != -100 for e in examples for t in e["labels"]),
        "longest": LENGTHS[1], "max_seq_len": 1000, "missing_eos": 0,
    }  # fmt: skip
    json.dumps(report.to_dict())
    assert report.text().startswith(f"3 of 3 rows, {sum(LENGTHS)} tokens, ")


def test_long_rows_are_dropped_and_said():
    examples, report = tokenize_dataset(ROWS, TOK, max_seq_len=LENGTHS[1] - 1, on_overlong="drop", path="a.jsonl")
    assert [e["line"] for e in examples] == [1, 4]
    assert (report.kept, report.dropped, report.truncated, report.longest) == (2, 1, 0, LENGTHS[1])
    assert f"1 dropped (longer than {LENGTHS[1] - 1} tokens)" in report.text()
    examples, report = tokenize_dataset(ROWS, TOK, max_seq_len=LENGTHS[1], path="a.jsonl")
    assert (report.kept, report.dropped) == (3, 0)


def test_long_rows_are_cut_and_said():
    most = LENGTHS[1] - 3
    examples, report = tokenize_dataset(ROWS, TOK, max_seq_len=most, on_overlong="truncate", path="a.jsonl")
    assert [len(e["input_ids"]) for e in examples] == [len(e["labels"]) for e in examples] == [
        LENGTHS[0], most, LENGTHS[2]]  # fmt: skip
    assert (report.kept, report.dropped, report.truncated) == (3, 0, 1)
    assert f"1 truncated to {most} tokens" in report.text()


def test_long_rows_as_an_error_name_lines_and_the_longest():
    with pytest.raises(DataError) as fault:
        tokenize_dataset(ROWS, TOK, max_seq_len=LENGTHS[1] - 1, on_overlong="error", path="a.jsonl")
    assert f"a.jsonl: longer than {LENGTHS[1] - 1} tokens: line 2;" in str(fault.value)
    assert f"the longest has {LENGTHS[1]}" in str(fault.value)
    assert f"--max-seq-len {LENGTHS[1]}" in str(fault.value)
    assert fault.value.exit_code == 1


def test_all_dropped_and_no_rows():
    with pytest.raises(DataError, match="all 3 rows were dropped: each is longer than 5 tokens"):
        tokenize_dataset(ROWS, TOK, max_seq_len=5, path="a.jsonl")
    with pytest.raises(DataError, match="there is no row"):
        tokenize_dataset([], TOK, max_seq_len=5, path="a.jsonl")


def test_rows_whose_tokens_are_all_masked():
    with pytest.raises(DataError, match="no supervised token in") as fault:
        tokenize_dataset(ROWS, TOK, max_seq_len=6, on_overlong="truncate", path="a.jsonl")
    assert "lines 1, 2, 4" in str(fault.value)
    assert "--max-seq-len" in str(fault.value)
    # The marked part is empty: the template gives the model nothing to say.
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="no supervised token in line 1"):
        tokenize_dataset(ROWS[:1], make_tokenizer(silent, ["<s>"]), max_seq_len=99, path="a.jsonl")


def test_rows_the_template_refuses_are_all_named():
    bad = [row("a", 3, role="user"), ROWS[0], Row([{"role": "system", "content": "x"}], 9)]
    with pytest.raises(DataError) as fault:
        tokenize_dataset(bad, TOK, max_seq_len=99, path="a.jsonl")
    assert "a.jsonl:3: the chat template refuses these messages: Conversation roles must alternate" in str(fault.value)
    assert "a.jsonl:9: the chat template refuses these messages: System role not supported" in str(fault.value)


def test_turns_without_an_end_token_are_counted():
    plain = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["<s>"])
    _, report = tokenize_dataset(ROWS, plain, max_seq_len=999, path="a.jsonl")
    assert report.missing_eos == 3
    assert "3 of them without an end-of-turn token at the end" in report.text()


def test_settings_out_of_range():
    with pytest.raises(UsageError, match="on_overlong is 'trunkate'; did you mean 'truncate'") as fault:
        tokenize_dataset(ROWS, TOK, max_seq_len=9, on_overlong="trunkate", path="a.jsonl")
    assert fault.value.exit_code == 2
    with pytest.raises(UsageError, match="max_seq_len is 1"):
        tokenize_dataset(ROWS, TOK, max_seq_len=1, path="a.jsonl")


def test_no_template_is_the_models_fault():
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_dataset(ROWS, make_tokenizer(None, ["<s>"]), max_seq_len=9, path="a.jsonl")
