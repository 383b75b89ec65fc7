"""Validation of a data set: the report, issues of templates and texts, similar rows."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from error_facts import has_code
from row_files import find_issues, write_jsonl
from tiny_tokenizer import CHATML, GEMMA, GEMMA_TOK, SMOLLM2_TOK, make_tokenizer, template_text

from slimtune.core.data.packing import pack_into_one_sequence
from slimtune.core.data.tokenize import BATCH_SIZE, tokenize_dataset
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.errors import DataError, ModelError, UsageError
from slimtune.evaluation.data_report import near_duplicates as near
from slimtune.evaluation.data_report.report_builder import DataReportBuilder, make_data_report
from slimtune.evaluation.data_report.row_checks import FINDING_TYPES, RowFinding, make_data_issue
from slimtune.evaluation.data_report.row_facts import SHOWN_LINES, AffectedRows
from slimtune.evaluation.data_report.text_checks import (
    detect_rendered_chat_format,
    find_encoding_issues,
    is_placeholder_answer,
)
from slimtune.extras.row_files import open_rows

WORDS = ["sage", "oak", "river", "lamp", "stone", "cloud", "fern", "hill", "iron", "jar", "kite", "leaf", "moon",
         "nest", "owl", "pine", "quill", "rope", "sand", "tent"]  # fmt: skip


def chat(user, answer, system=None):
    turns = [("system", system), ("user", user), ("assistant", answer)]
    return {"messages": [{"role": r, "content": c} for r, c in turns if c is not None]}


def random_words(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def make_rows(n=30, **replaced):
    """Chats of random words; `row3=…` replaces the third."""
    rng = random.Random(0)
    answers = [(random_words(rng, 6), random_words(rng, rng.randint(4, 30))) for _ in range(n)]
    rows = [chat(f"Tell {i}: {question}?", f"{answer} {i}.") for i, (question, answer) in enumerate(answers)]
    return [replaced.get(f"row{i}", row) for i, row in enumerate(rows, 1)]


def make_report(tmp_path, rows, tokenizer=SMOLLM2_TOK, **options):
    return make_data_report(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, model="tiny", processes=1, **options)


def validate(*args, **options):
    return to_json_dict(make_report(*args, **options))


def list_issues(report):
    return {issue["code"]: (issue["severity"], issue["lines"]) for issue in report["issues"]}


def test_report_counts_what_training_keeps(tmp_path):
    report = validate(tmp_path, make_rows(), rows_per_step=4)
    assert (report["format"], report["rows"], report["verdict"], report["issues"]) == ("chat", 30, "ok", [])
    dataset, counts = tokenize_dataset(open_rows(report["file"]), SMOLLM2_TOK, max_seq_len=1024, source_path="x")
    ids = [e["input_ids"] for e in dataset]
    assert (report["tokens"], report["supervised_tokens"]) == (counts.tokens, counts.supervised_tokens)
    assert report["lengths"]["max"] == counts.longest == max(map(len, ids))
    assert report["lengths"]["median"] in sorted(map(len, ids))[14:16]
    for bar in report["lengths"]["histogram"]:
        assert bar["rows"] == sum(bar["from"] <= len(row) <= bar["to"] for row in ids)
    packed = sum(len(pack_into_one_sequence(ids[at : at + 4]).tokens) for at in range(0, 30, 4))
    assert report["packing"] == {"packed_tokens": packed, "saved_share": 1 - packed / counts.tokens}
    shared = report["shared_prefix"]
    assert all(SMOLLM2_TOK.decode(row[: shared["tokens"]]) == shared["text"] for row in ids)
    assert len({row[shared["tokens"]] for row in ids}) > 1
    sample = report["samples"][1]
    supervised = "".join(p["text"] for p in sample["pieces"] if p["supervised"])
    assert (sample["line"], supervised) == (2, make_rows()[1]["messages"][1]["content"] + "<|im_end|>")
    assert "".join(p["text"] for p in sample["pieces"]).startswith("<|im_start|>system\n")
    json.dumps(report, allow_nan=False)


def test_training_gets_the_same_report(tmp_path):
    rows = make_rows(2 * BATCH_SIZE + 40)
    rows[BATCH_SIZE + 3] = rows[1]
    alone = validate(tmp_path, rows)
    file = open_rows(alone["file"])
    report = DataReportBuilder(SMOLLM2_TOK, file, max_seq_len=1024)
    tokenize_dataset(file, SMOLLM2_TOK, max_seq_len=1024, source_path="x", observer=report)
    assert list_issues(alone) == {"duplicate": ("warning", [BATCH_SIZE + 4])}
    assert {**alone, "seconds": 0} == {**to_json_dict(report.finish(file=alone["file"], model="tiny")), "seconds": 0}


@pytest.mark.parametrize(("policy", "severity"), [("drop", "warning"), ("truncate", "warning"), ("error", "error")])
def test_long_rows(tmp_path, policy, severity):
    rows = make_rows(row5=chat("Why?", random_words(random.Random(5), 200)))
    report = validate(tmp_path, rows, max_seq_len=400, on_overlong=policy)
    assert list_issues(report) == {"too-long": (severity, [5])}
    assert report["overlong"] == {"rows": 1, "lines": [5]}
    if policy != "error":
        rows = open_rows(report["file"])
        _, counts = tokenize_dataset(rows, SMOLLM2_TOK, max_seq_len=400, on_overlong=policy, source_path="x")
        assert report["tokens"] == counts.tokens
    assert list_issues(validate(tmp_path, make_rows(), max_seq_len=40))["too-long"][0] == "error"  # nearly all are


def test_invalid_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows())
    path.write_text(path.read_text() + "{\n" + json.dumps({"messages": []}) + "\n")
    report = to_json_dict(make_data_report(path, SMOLLM2_TOK, model="m", processes=1))
    assert list_issues(report) == {"bad-json": ("error", [31]), "no-assistant-turn": ("error", [32])}
    assert [(r["line"], r["code"]) for r in report["invalid_rows"]] == [(31, "bad-json"), (32, "no-assistant-turn")]
    assert (report["invalid_count"], report["rows"]) == (2, 32)


@pytest.mark.parametrize("options", [{"max_seq_len": 1}, {"on_overlong": "cut"}, {"train_on": "all"}])
def test_settings_out_of_range(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        validate(tmp_path, make_rows(3), **options)


def test_errors_stop_training(tmp_path):
    with pytest.raises(DataError) as error:
        make_report(tmp_path, make_rows(row5=chat("Hi", "So<|im_end|>"))).require_no_errors()
    assert error.value.message.endswith("('<|im_end|>', assistant): line 5")
    assert "--force" in error.value.hint
    make_report(tmp_path, make_rows()).require_no_errors()


SYSTEM = chat("Why?", "So.", system="Be brief.")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|end|>{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NAMED = make_tokenizer(template_text("smollm2"), ["<s>", "<filename>", *CHATML])
END = chat("What ends a turn?", "It is <end_of_turn>, they say.")


@pytest.mark.parametrize(
    ("tokenizer", "row", "issues"),
    [
        (GEMMA_TOK, SYSTEM, {"template-refuses": ("error", [3])}),
        (make_tokenizer(NO_SYSTEM, ["<|end|>"]), SYSTEM, {"template-leaves-out": ("error", [3])}),
        (make_tokenizer("<bos>" + template_text("gemma"), GEMMA), None, {"doubled-bos": ("error", [1, 2, 3])}),
        (make_tokenizer(NO_END, ["<s>"]), None, {"missing-end": ("error", [1, 2, 3])}),
        (GEMMA_TOK, END, {"control-token-in-text": ("error", [3])}),
        (SMOLLM2_TOK, END, {}),  # another base reads it as text
        (NAMED, chat("How?", "cat <filename>"), {}),  # people type it
    ],
)
def test_issues_that_depend_on_the_template(tmp_path, tokenizer, row, issues):
    rows = make_rows(3) if row is None else make_rows(3, row3=row)
    assert list_issues(validate(tmp_path, rows, tokenizer)) == issues


def test_no_chat_template(tmp_path):
    with pytest.raises(ModelError, check=has_code("chat-template-missing")):
        validate(tmp_path, make_rows(3), make_tokenizer(None, ["<s>"]))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Le cafÃ© est fermÃ©.", "mojibake"), ("Itâ€™s late.", "mojibake"),
        ("Lost: \ufffd here", "replacement-character"),
        ("a\0b", "null-byte"), ("a\x07b", "control-character"), ("x \ufeffy", "byte-order-mark"),
        ("Smith &amp; Sons", "html-entity"), ("it&#39;s", "html-entity"), ("pаypal", "mixed-script"),
        ("Why Ã© in Latin-1?", None), ("U+FFFD is \ufffd", None), ("In HTML, &amp; is an ampersand", None),
        ("<p>Smith &amp; Sons</p>", None), ("`a &amp; b`", None), ("f?a=1&copy=2", None), ("VIPы и SMSки", None),
        ("NÃO É MAÇÃ", None), ("« à »", None), ("def f():\n\tpass\n\f", None), ("👩‍👩‍👧 می‌خواهم", None),
    ],
)  # fmt: skip
def test_text_issue(text, code):
    assert [c for c, _ in find_encoding_issues([text])] == ([code] if code else [])


def test_rendered_text_begins_with_its_format():
    assert detect_rendered_chat_format("<s>[INST] Hi [/INST]") == "Llama 2"
    assert detect_rendered_chat_format("\n<|im_start|>user\nHi<|im_end|>") == "ChatML"
    assert detect_rendered_chat_format("### Instruction:\nAdd.\n\n### Response:\n") == "Alpaca"
    for text in ("[INST] begins a turn", "### Instruction:\nWeigh it.", "See <|im_start|>user", "Human: a being"):
        assert detect_rendered_chat_format(text) is None


def test_placeholder_answers():
    assert all(map(is_placeholder_answer, ("...", " — ", "nan", "[removed]", "TODO", "#N/A")))
    answers = ("+", "👍", "4", "A", "None", "null", "N/A", "да", "π", "nan is a float", "=", ".- -...", ":-)")
    assert not any(map(is_placeholder_answer, answers))


def test_hashes_ignore_white_space_and_unicode_form():
    assert near.hash_whitespace_normalized_texts("a  b\n") == near.hash_whitespace_normalized_texts("a b")
    assert near.hash_whitespace_normalized_texts("e\u0301") == near.hash_whitespace_normalized_texts("\u00e9")
    assert (
        len({near.hash_whitespace_normalized_texts(*texts) for texts in (["a b"], ["A b"], ["a", "b"], ["a b."])}) == 4
    )


def test_near_duplicates_have_the_true_similarity():
    rng = random.Random(3)
    rows = [[rng.randrange(5000) for _ in range(120)] for _ in range(200)]
    for i, changed in enumerate(range(0, 40, 2)):  # row 200 + i is row i with that many of its 120 tokens changed
        rows.append(list(rows[i]))
        for at in rng.sample(range(120), changed):
            rows[-1][at] = rng.randrange(5000)
    signatures, comparable = near.compute_minhash_and_comparable_mask(
        rows, [[True] * len(r) for r in rows], np.zeros(0, np.uint32)
    )
    assert comparable.all()
    found = dict(zip(*(x.tolist() for x in near.match_minhash_signatures(signatures)), strict=True))
    for i in range(20):
        a, b = (set(zip(row, row[1:], row[2:], strict=False)) for row in (rows[i], rows[200 + i]))
        similarity = len(a & b) / len(a | b)
        if similarity > 0.92:
            assert found[200 + i] == i, similarity
        if similarity < 0.65:
            assert 200 + i not in found, similarity
    assert min(found) >= 200
    late, early = near.match_minhash_signatures(signatures[:200], signatures[200:])  # the same over two files
    assert dict(zip((late + 200).tolist(), early.tolist(), strict=True)) == found


def test_common_trigrams_do_not_count():
    shared, own = list(range(40)), list(range(100, 130))
    common = near.find_common_trigram_hashes([[*shared, 200 + i, 300 + i] for i in range(20)])
    rows, supervised = [shared + own, [*shared, 7, 8, 9]], [[False] * 40 + [True] * 30, [True] * 43]
    assert near.compute_minhash_and_comparable_mask(rows, supervised, common)[1].tolist() == [True, False]
    assert len(near.find_common_trigram_hashes([own])) == 0
    assert near.compute_minhash_and_comparable_mask([], [], common)[0].shape == (0, 2 * near.HASHES)
    assert near.compute_minhash_and_comparable_mask([[1], [2, 3]], [[True], [True, True]], common)[1].tolist() == [
        False,
        False,
    ]


def test_repeats_name_the_first():
    again, first = near.find_repeat_and_first_positions(np.array([5, 9, 5, 9, 7, 5], dtype=np.uint64))
    assert (again.tolist(), first.tolist()) == ([2, 3, 5], [0, 1, 0])


@pytest.mark.parametrize(("count", "severity"), [(1, "warning"), (10, "error")])
def test_severity_depends_on_the_share_of_rows(count, severity):
    found = make_data_issue(RowFinding("mojibake", AffectedRows(count)), file_row_count=100)
    assert (found.severity, found.count) == (severity, count)


def test_an_issue_names_its_first_lines(tmp_path):
    (issue,) = make_report(tmp_path, make_rows(30), make_tokenizer(NO_END, ["<s>"])).issues
    assert (issue.code, issue.severity, issue.count) == ("missing-end", "error", 30)
    assert issue.lines == list(range(1, SHOWN_LINES + 1))
    assert str(issue).endswith("30 rows, lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, … (18 more)")


def test_roles_that_are_swapped_in_every_row_are_an_error(tmp_path):
    def talk(i, *roles):
        return {"messages": [{"role": role, "content": f"{role} {i} {n}"} for n, role in enumerate(roles)]}

    swapped = [talk(i, "assistant", "user") for i in range(9)]
    found = find_issues(write_jsonl(tmp_path / "a.jsonl", swapped), SMOLLM2_TOK)["swapped-roles"]
    assert (found["severity"], found["count"]) == ("error", 9)
    greeting = [talk(i, "assistant", "user", "assistant") for i in range(9)]
    few = find_issues(write_jsonl(tmp_path / "b.jsonl", [*greeting, swapped[0]]), SMOLLM2_TOK)
    assert (few["swapped-roles"]["severity"], few["swapped-roles"]["lines"]) == ("warning", [10])


def test_documentation_names_every_issue():
    text = (Path(__file__).parents[2] / "docs" / "data_report.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (`.*?) \| .* \|(.*)\|$", text, re.MULTILINE))
    shares = {code: share.strip() for codes, share in table.items() for code in re.findall(r"`([\w-]+)`", codes)}
    named = {None: "", 0: "1 row"}
    for code, kind in FINDING_TYPES.items():
        assert shares[code] == named.get(kind.error_from_share, f"{100 * (kind.error_from_share or 0):g} %"), code
