"""What the data report says about preference pairs: contradictions, and answers that their length decides."""

import json

import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.validation.report import report_facts, validate_file

TOK = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def validate(tmp_path, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate_file(path, TOK, model="tiny", processes=1, **options)
    return report, {issue["code"]: issue for issue in report["issues"]}


def pair(i, chosen, rejected):
    return {"prompt": f"question {i}:", "chosen": chosen, "rejected": rejected}


def make_pairs(longer, shorter):
    long, short = " a much longer answer than that", " brief"
    return [pair(i, long, short) if i < longer else pair(i, short, long) for i in range(longer + shorter)]


def test_pair_that_an_earlier_one_contradicts(tmp_path):
    rows = [pair(0, " A", " B"), pair(1, " A", " B"), pair(0, " B", " A"), pair(0, " C", " A"), pair(0, " A", " B")]
    _, issues = validate(tmp_path, rows)
    assert issues["contradictory-pair"]["lines"] == [3, 5]
    assert "line 3 contradicts line 1" in issues["contradictory-pair"]["what"]
    assert "contradiction" not in issues


def test_contradiction_of_messages_and_of_lists(tmp_path):
    user, (yes, no) = [{"role": "user", "content": "Q"}], ([{"role": "assistant", "content": t}] for t in ("yes", "no"))
    _, issues = validate(tmp_path, [{"prompt": user, "chosen": a, "rejected": b} for a, b in ((yes, no), (no, yes))])
    assert issues["contradictory-pair"]["lines"] == [2]
    lists = [{"prompt": "Q", "responses": [" a", " b", " c"], "scores": scores} for scores in ([3, 2, 1], [1, 2, 3])]
    assert validate(tmp_path, lists)[1]["contradictory-pair"]["lines"] == [2]


@pytest.mark.parametrize(("longer", "shorter", "leaks"), [(28, 2, True), (2, 28, True), (18, 12, False), (4, 0, False)])
def test_length_that_decides_pairs_is_a_warning(tmp_path, longer, shorter, leaks):
    report, issues = validate(tmp_path, make_pairs(longer, shorter))
    assert (report["pairs"]["better_longer"], report["pairs"]["better_shorter"]) == (longer, shorter)
    low, high = report["pairs"]["longer_share_ci95"]
    assert low <= longer / (longer + shorter) <= high + 1e-12
    assert ("length-leak" in issues) == leaks
    if leaks:
        assert issues["length-leak"]["severity"] == "warning"
        assert issues["length-leak"]["count"] == max(longer, shorter)
        assert "28 of 30, 95 % interval 79 to 98 %" in issues["length-leak"]["what"]


def test_report_shows_the_share(tmp_path):
    report, _ = validate(tmp_path, make_pairs(18, 12))
    assert ("better answer", "the longer one in 60 % of the pairs (42 to 75 %)") in report_facts(report)
    assert validate(tmp_path, [{"prompt": "Q", "completion": "A"}])[0]["pairs"] is None
