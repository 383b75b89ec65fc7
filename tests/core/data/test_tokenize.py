"""Tokenized rows: labels, what happens to long rows, and that the report counts all of it."""

import json
import re

import pytest
from tiny_tokenizer import GEMMA_TOK as TOK
from tiny_tokenizer import make_tokenizer

from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.core.data.rows import Row
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.errors import DataError, ModelError, UsageError
from slimtune.extras.row_digest import hash_rows
from slimtune.extras.row_files import open_rows


def row(answer, line, role="assistant"):
    return Row([{"role": "user", "content": "Define patience."}, {"role": role, "content": answer}], line)


ROWS = [row("A lie.", 1), row("A minor form of despair, disguised as a virtue. " * 4, 2), row("Despair.", 4)]
LENGTHS = [len(encode_chat_with_train_mask(TOK, r.messages).input_ids) for r in ROWS]
LONG = LENGTHS[1]


def tokenize(rows=ROWS, tokenizer=TOK, max_seq_len=1000, **options):
    return tokenize_dataset(rows, tokenizer, max_seq_len=max_seq_len, source_path="a.jsonl", **options)


def test_labels_are_the_supervised_tokens():
    examples, report = tokenize()
    assert [e["line"] for e in examples] == [1, 2, 4]
    for example, source in zip(examples, ROWS, strict=True):
        alone = encode_chat_with_train_mask(TOK, source.messages)
        assert example["input_ids"] == alone.input_ids
        labels = [t if learned else -100 for t, learned in zip(alone.input_ids, alone.supervised, strict=True)]
        assert example["labels"] == labels
        assert TOK.decode([t for t in labels if t != -100]) == source.messages[1]["content"].strip() + "<end_of_turn>"
    assert report.to_dict() == {
        "rows": 3, "kept": 3, "dropped": 0, "truncated": 0, "tokens": sum(LENGTHS),
        "supervised_tokens": sum(t != -100 for e in examples for t in e["labels"]),
        "longest": LONG, "max_seq_len": 1000, "missing_eos": 0,
    }  # fmt: skip
    json.dumps(report.to_dict())
    assert report.text().startswith(f"3 of 3 rows, {sum(LENGTHS)} tokens, ")


def test_long_rows_are_dropped():
    examples, report = tokenize(max_seq_len=LONG - 1)
    assert [e["line"] for e in examples] == [1, 4]
    assert (report.kept, report.dropped, report.truncated, report.longest) == (2, 1, 0, LONG)
    assert f" {LONG - 1} tokens" in report.text()
    assert tokenize(max_seq_len=LONG)[1].dropped == 0


def test_long_rows_are_truncated():
    examples, report = tokenize(max_seq_len=LONG - 3, on_overlong="truncate")
    assert examples.lengths.tolist() == [len(e["labels"]) for e in examples] == [LENGTHS[0], LONG - 3, LENGTHS[2]]
    assert (report.kept, report.dropped, report.truncated) == (3, 0, 1)
    assert f" {LONG - 3} tokens" in report.text()


def test_select(tmp_path):
    (tmp_path / "a.txt").write_text("A minor form of despair, disguised as a virtue.\n\n" * 700)
    examples, report = tokenize(open_rows(tmp_path / "a.txt"))
    assert (len(examples), examples.lengths.sum()) == (700, report.tokens)
    kept = examples.select(examples.lengths.argsort(kind="stable")[:3])
    assert [e["line"] for e in kept[1:]] == [3, 5]
    assert kept[0]["labels"][1:] == kept[0]["input_ids"][1:]
    assert hash_rows(kept) != hash_rows(examples) == hash_rows(tokenize(open_rows(tmp_path / "a.txt"))[0])


SILENT = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_len": LONG - 1, "on_overlong": "error"}, DataError,
         rf"longer than {LONG - 1} tokens: line 2; the longest has {LONG}[^\0]*--max-seq-len {LONG}"),
        ({"max_seq_len": 5}, DataError, "all 3 rows were dropped: each is longer than 5 tokens"),
        ({"rows": []}, DataError, "there is no row"),
        ({"max_seq_len": 6, "on_overlong": "truncate"}, DataError,
         r"no supervised token in lines 1, 2, 4[^\0]*--max-seq-len"),
        ({"rows": ROWS[:1], "tokenizer": make_tokenizer(SILENT, ["<s>"])}, DataError, "no supervised token in line 1"),
        ({"on_overlong": "trunkate"}, UsageError, "on_overlong is 'trunkate'; did you mean 'truncate'"),
        ({"max_seq_len": 1}, UsageError, "max_seq_len is 1"),
        ({"tokenizer": make_tokenizer(None, ["<s>"])}, ModelError, "no chat template"),
    ],
)  # fmt: skip
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        tokenize(**options)


def test_all_rows_that_the_template_refuses_are_named():
    bad = [row("a", 3, role="user"), ROWS[0], Row([{"role": "system", "content": "x"}], 9)]
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*Conversation roles must alternate") as error:
        tokenize(bad)
    assert re.search(r"a\.jsonl:9: .*System", str(error.value))


def test_turns_without_an_end_are_counted():
    plain = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["<s>"])
    _, report = tokenize(tokenizer=plain)
    assert report.missing_eos == 3


def test_content_is_the_common_prompt_and_the_learned_share():
    examples, report = tokenize()
    shared, supervised, *_ = examples.content
    assert supervised == pytest.approx(report.supervised_tokens / report.tokens)
    assert shared >= 8
    assert len({tuple(e["input_ids"][:shared]) for e in examples}) == 1
    assert len({tuple(e["input_ids"][: shared + 1]) for e in examples}) > 1
