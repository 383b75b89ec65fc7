"""The survey's parts: findings of the template, near rows, keys, lengths, packing, batches and processes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.dataset import tokenize_dataset
from slimtune.data.packing import pack_sequences
from slimtune.data.read import open_rows
from slimtune.data.tokenize import BATCH
from slimtune.data.validation.html_report import render_html
from slimtune.data.validation.issues import KINDS, SHOWN, IssueCounter
from slimtune.data.validation.near_duplicates import HASHES, common, key, near_pairs, repeats, signatures
from slimtune.data.validation.report import DatasetReport
from slimtune.data.validation.summary import format_issue, raise_if_invalid, report_facts
from slimtune.data.validation.text_checks import is_placeholder, rendered_as, text_marks
from slimtune.data.validation.validate_file import validate_file
from slimtune.errors import DataError, ModelError, UsageError

CHATML = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
GEMMA = make_tokenizer(template_text("gemma"), ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"])
WORDS = [
    "sage",
    "oak",
    "river",
    "lamp",
    "stone",
    "cloud",
    "fern",
    "hill",
    "iron",
    "jar",
    "kite",
    "leaf",
    "moon",
    "nest",
    "owl",
    "pine",
    "quill",
    "rope",
    "sand",
    "tent",
]


def talk(user, answer, system=None):
    said = [("system", system), ("user", user), ("assistant", answer)]
    return {"messages": [{"role": r, "content": c} for r, c in said if c is not None]}


def words(draw, n):
    return " ".join(draw.choices(WORDS, k=n))


def some(n=30, seed=0):
    draw = random.Random(seed)
    return [talk(f"Tell {i}: {words(draw, 6)}?", f"{words(draw, draw.randint(4, 30))} {i}.") for i in range(n)]


def written(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def report_of(tmp_path, rows, tokenizer=CHATML, **options):
    path = written(tmp_path / "rows.jsonl", rows)
    return validate_file(path, tokenizer, model="tiny", processes=1, **options)


def codes(report):
    return {f["code"]: (f["severity"], f["lines"]) for f in report["findings"]}


# --- the report


def test_the_report_has_the_keys_that_others_read(tmp_path):
    rows = some()
    report = report_of(tmp_path, rows, rows_a_step=4)
    assert list(report) == [
        "file", "format", "model", "rows", "refused", "refused_count", "tokens", "supervised_tokens",
        "supervised_share", "lengths",
        "max_seq_len", "on_overlong", "shared_prefix", "packing", "findings", "samples", "verdict", "seconds",
    ]  # fmt: skip
    assert (report["format"], report["rows"], report["verdict"], report["findings"]) == ("chat", 30, "sound", [])
    examples, counted = tokenize_dataset(open_rows(report["file"]), CHATML, max_seq_len=1024, path="x")
    ids = [e["input_ids"] for e in examples]
    assert (report["tokens"], report["supervised_tokens"]) == (counted.tokens, counted.supervised_tokens)
    assert report["supervised_share"] == counted.supervised_tokens / counted.tokens
    assert report["lengths"]["max"] == counted.longest == max(map(len, ids))
    assert report["lengths"]["median"] in sorted(map(len, ids))[14:16]
    assert sum(b["rows"] for b in report["lengths"]["histogram"]) == 30
    for b in report["lengths"]["histogram"]:
        assert b["rows"] == sum(b["from"] <= len(row) <= b["to"] for row in ids)
    laid = sum(len(pack_sequences(ids[at : at + 4]).tokens) for at in range(0, 30, 4))
    assert report["packing"] == {"laid_tokens": laid, "saved_share": 1 - laid / counted.tokens}
    shared = report["shared_prefix"]
    assert all(CHATML.decode(row[: shared["tokens"]]) == shared["text"] for row in ids)
    assert len({row[shared["tokens"]] for row in ids}) > 1
    json.dumps(report, allow_nan=False)


def test_samples_show_what_is_learned(tmp_path):
    sample = report_of(tmp_path, some())["samples"][1]
    said = "".join(p["text"] for p in sample["pieces"] if p["learned"])
    assert sample["line"] == 2
    assert said == some()[1]["messages"][1]["content"] + "<|im_end|>"
    assert "".join(p["text"] for p in sample["pieces"]).startswith("<|im_start|>system\n")


def test_long_rows_are_counted_and_by_setting_a_fault(tmp_path):
    rows = some()
    rows[4] = talk("Why?", words(random.Random(5), 200))
    for on_overlong, severity in (("drop", "warning"), ("truncate", "warning"), ("error", "fault")):
        report = report_of(tmp_path, rows, max_seq_len=400, on_overlong=on_overlong)
        assert codes(report) == {"too-long": (severity, [5])}
        assert report["on_overlong"] == {"rows": 1, "lines": [5]}
        _, counted = tokenize_dataset(
            open_rows(report["file"]), CHATML, max_seq_len=400, on_overlong="drop" if on_overlong == "error" else on_overlong,
            path="x",
        )  # fmt: skip
        assert report["tokens"] == counted.tokens
    assert codes(report_of(tmp_path, rows, max_seq_len=40))["too-long"][0] == "fault"


def test_refused_rows_are_faults_with_their_cause(tmp_path):
    path = written(tmp_path / "a.jsonl", some())
    path.write_text(path.read_text() + "{\n" + json.dumps({"messages": []}) + "\n")
    report = validate_file(path, CHATML, model="m", processes=1)
    assert codes(report) == {"bad-json": ("fault", [31]), "no-assistant-turn": ("fault", [32])}
    assert [(r["line"], r["code"]) for r in report["refused"]] == [(31, "bad-json"), (32, "no-assistant-turn")]
    assert "does not parse as JSON" in report["refused"][0]["cause"]
    assert (report["refused_count"], report["rows"]) == (2, 32)


def test_a_setting_out_of_range_and_no_file(tmp_path):
    for options in ({"max_seq_len": 1}, {"rows_a_step": 0}):
        with pytest.raises(UsageError):
            report_of(tmp_path, some(), **options)
    with pytest.raises(UsageError, match="no such file"):
        validate_file(tmp_path / "none.jsonl", CHATML, model="m")


# --- what is the template's fault


def test_rows_that_the_template_refuses(tmp_path):
    rows = some()
    rows[7] = talk("Why?", "So.", system="Be brief.")
    report = report_of(tmp_path, rows, GEMMA)
    assert codes(report) == {"template-refuses": ("fault", [8])}
    assert "System role not supported" in report["findings"][0]["what"]
    silent = make_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|end|>{% endif %}{% endfor %}",
        ["<|end|>"],
    )
    assert codes(report_of(tmp_path, rows, silent)) == {"template-leaves-out": ("fault", [8])}


def test_a_base_without_a_template_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        report_of(tmp_path, some(), make_tokenizer(None, ["<s>"]))


def test_a_doubled_beginning(tmp_path):
    twice = make_tokenizer("<bos>" + template_text("gemma"), ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"])
    report = report_of(tmp_path, some(3), twice)
    assert codes(report) == {"doubled-bos": ("fault", [1, 2, 3])}
    assert codes(report_of(tmp_path, some(3), GEMMA)) == {}


def test_turns_without_an_end(tmp_path):
    plain = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["<s>"])
    report = report_of(tmp_path, some(), plain)
    assert codes(report) == {"missing-end": ("fault", list(range(1, SHOWN + 1)))}
    assert report["findings"][0]["count"] == 30


def test_a_token_is_a_control_token_by_the_base(tmp_path):
    rows = some()
    rows[2] = talk("What ends a turn?", "It is <end_of_turn>, they say.")
    rows[3] = talk("And usage?", "cat <filename>")
    assert codes(report_of(tmp_path, rows, GEMMA)) == {"control-token-in-text": ("fault", [3])}
    assert codes(report_of(tmp_path, rows, CHATML)) == {}
    named = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<filename>", "<|im_start|>", "<|im_end|>"])
    assert codes(report_of(tmp_path, rows, named)) == {}


# --- texts


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
def test_marks_of_a_text(text, code):
    assert [c for c, _ in text_marks([text])] == ([code] if code else [])


def test_what_has_been_rendered_begins_so():
    assert rendered_as("<s>[INST] Hi [/INST]") == "Llama 2"
    assert rendered_as("\n<|im_start|>user\nHi<|im_end|>") == "ChatML"
    assert rendered_as("### Instruction:\nAdd.\n\n### Response:\n") == "Alpaca"
    for text in ("[INST] begins a turn", "### Instruction:\nWeigh it.", "See <|im_start|>user", "Human: a being"):
        assert rendered_as(text) is None


def test_hollow_answers():
    assert all(map(is_placeholder, ("...", " — ", "nan", "[removed]", "TODO", "#N/A")))
    assert not any(
        map(
            is_placeholder,
            ("+", "👍", "4", "A", "None", "null", "N/A", "да", "π", "nan is a float", "=", ".- -...", ":-)"),
        )
    )


# --- rows that are alike


def test_keys_pass_over_white_space_only():
    assert key("a  b\n") == key("a b")
    assert key("e\u0301") == key("\u00e9")
    assert len({key("a b"), key("A b"), key("a", "b"), key("a b.")}) == 4


def test_near_rows_are_those_of_the_true_similarity():
    draw = random.Random(3)
    rows = [[draw.randrange(5000) for _ in range(120)] for _ in range(200)]
    pairs = {}
    for i, changed in enumerate(range(0, 40, 2)):  # token edits, from none to 40 of 120
        again = list(rows[i])
        for at in draw.sample(range(120), changed):
            again[at] = draw.randrange(5000)
        pairs[len(rows)] = i
        rows.append(again)
    masks = [[True] * len(r) for r in rows]
    signed, judged = signatures(rows, masks, np.zeros(0, np.uint32))
    assert judged.all()
    found = dict(zip(*(x.tolist() for x in near_pairs(signed)), strict=True))

    def grams(row):
        return set(zip(row, row[1:], row[2:], strict=False))

    for late, early in pairs.items():
        a, b = grams(rows[late]), grams(rows[early])
        true = len(a & b) / len(a | b)
        if true > 0.92:
            assert found[late] == early, true
        if true < 0.65:
            assert late not in found, true
    assert set(found) <= set(pairs)
    # The same over two files.
    late, early = near_pairs(signed[:200], signed[200:])
    assert {(n + 200, of) for n, of in zip(late.tolist(), early.tolist(), strict=True)} == set(found.items())


def test_signatures_judge_what_is_a_rows_own():
    shared, own = list(range(40)), list(range(100, 130))
    known = common([[*shared, 200 + i, 300 + i] for i in range(20)])
    _, judged = signatures([shared + own, [*shared, 7, 8, 9]], [[False] * 40 + [True] * 30, [True] * 43], known)
    assert judged.tolist() == [True, False]
    assert len(common([own])) == 0
    assert signatures([], [], known)[0].shape == (0, 2 * HASHES)
    assert signatures([[1], [2, 3]], [[True], [True, True]], known)[1].tolist() == [False, False]


def test_repeats_name_the_first():
    again, first = repeats(np.array([5, 9, 5, 9, 7, 5], dtype=np.uint64))
    assert (again.tolist(), first.tolist()) == ([2, 3, 5], [0, 1, 0])


def test_a_severity_is_a_share_of_the_rows():
    for count, severity in ((1, "warning"), (10, "fault")):
        tally = IssueCounter()
        tally.add("mojibake", range(1, count + 1))
        (found,) = tally.findings(100)
        assert (found.severity, found.count) == (severity, count)


# --- as training sees it


def test_the_watch_of_training_reports_the_same(tmp_path):
    rows = some(2 * BATCH + 40)
    rows[BATCH + 3] = rows[1]
    path = written(tmp_path / "a.jsonl", rows)
    alone = validate_file(path, CHATML, model="m", processes=1)
    survey = DatasetReport(CHATML, max_seq_len=1024)
    survey.format = "chat"
    tokenize_dataset(open_rows(path), CHATML, max_seq_len=1024, path=path, watch=survey)
    beside = survey.report(file=path, model="m")
    assert codes(alone) == {"duplicate": ("warning", [BATCH + 4])}
    assert {**alone, "seconds": 0} == {**beside, "seconds": 0}


def test_faults_stop_training_and_say_how_to_go_on(tmp_path):
    rows = some()
    rows[4] = talk("Hi", "So<|im_end|>")
    with pytest.raises(DataError) as stopped:
        raise_if_invalid(report_of(tmp_path, rows))
    assert stopped.value.message.endswith("('<|im_end|>', assistant): line 5")
    assert "--force" in stopped.value.hint
    raise_if_invalid(report_of(tmp_path, some()))


# --- as people see it


def test_the_page_is_one_file_and_escapes_what_rows_say(tmp_path):
    rows = some()
    rows[0] = talk("<script>alert(1)</script>", "a & b <b>")
    rows[5] = rows[4]
    report = report_of(tmp_path, rows)
    text = render_html(report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    assert "<mark>" in text
    assert "line 6 as line 5" in text
    for _, value in report_facts(report):
        assert value


def test_a_finding_in_words():
    finding = {"count": 3, "what": "rows", "lines": [4, 9, 11], "code": "x"}
    assert format_issue(finding) == "rows: 3 rows, lines 4, 9, 11"
    assert format_issue({**finding, "count": 50}) == "rows: 50 rows, lines 4, 9, 11, … (47 more)"


def test_the_documentation_names_every_finding():
    text = (Path(__file__).parents[2] / "docs" / "data_report.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (`.*?) \| .* \|(.*)\|$", text, re.MULTILINE))
    shares = {code: share.strip() for codes, share in table.items() for code in re.findall(r"`([\w-]+)`", codes)}
    told = {None: "", 0: "1 row"}
    for code, kind in KINDS.items():
        if code != "validation-refused":
            assert shares[code] == told.get(kind.fault_from, f"{100 * (kind.fault_from or 0):g} %"), code
