"""Answers of base and tuned model to the same prompts, and their checks."""

import json
import sys

import pytest
from hand_run import TALKS, write_rows
from run_answers import RunAnswers

from slimtune.core.data.rows import Row
from slimtune.errors import ModelError, UsageError
from slimtune.evaluation.eval_result import AnswerPair, BaseAndTunedAnswerMeasure, read_eval_result
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.generated_answers import (
    average_answer_checks,
    build_answer_check,
    measure_repetition,
    select_eval_prompts,
)
from slimtune.evaluation.result_lines import make_answer_check_table


def test_answers_equal_those_of_generate(run):
    result = evaluate(run, EvalSettings(generate=3, max_new_tokens=12, checks=["exact", "regex:."]))
    found = result.generations
    assert [g.line for g in found] == [1, 3, 5]
    generator = RunAnswers.open(run)
    for one in found:
        question, answer = TALKS[one.line - 1]
        assert (one.prompt, one.reference) == ([{"role": "user", "content": question}], answer)
        for who in ("base", "tuned"):
            assert getattr(one, who) == generator.generate(one.prompt, tuned=who == "tuned", max_new_tokens=12)
        assert set(one.checks) == {"tokens", "repetition", "ended", "exact", "regex:."}
    assert any(g.base != g.tuned for g in found)
    assert result.generation_summary["tokens"].base == sum(g.checks["tokens"].base for g in found) / 3
    assert read_eval_result(json.loads((run / "eval-test.json").read_text())).generations == found


def test_prompts_are_spread_over_the_rows():
    talk = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    rows = [Row(talk, line) for line in range(1, 101)]
    prompts = select_eval_prompts(rows, [{"line": line} for line in range(11, 61)], 3)
    assert [p.line for p in prompts] == [11, 35, 60]
    assert (prompts[0].messages, prompts[0].reference) == (talk[:3], "d")
    assert len(select_eval_prompts(rows, [{"line": 1}], 5)) == 1


def test_summary():
    checks = [
        {"ended": BaseAndTunedAnswerMeasure(base=b, tuned=True), "tokens": BaseAndTunedAnswerMeasure(base=2, tuned=n)}
        for b, n in ((1, 1), (0, 4))
    ]
    summary = {
        "ended": BaseAndTunedAnswerMeasure(base=0.5, tuned=1.0),
        "tokens": BaseAndTunedAnswerMeasure(base=2.0, tuned=2.5),
    }
    answers = [AnswerPair(line=1, prompt=[], reference="", base="a", tuned="b", checks=c) for c in checks]
    assert average_answer_checks(answers) == summary
    table = make_answer_check_table(summary, answers)
    assert table.rows == [("ended", "50 %", "100 %"), ("tokens", "2", "2.5")]


def test_prompt_without_room_fails_before_scoring(run, tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [("x" * 400, "y")])
    with pytest.raises(UsageError, match=r"\b512\b"):
        evaluate(run, EvalSettings(data=long, generate=1))
    assert not (run / "eval-data-long.json").exists()


@pytest.mark.parametrize(
    ("name", "answer", "passes"),
    [
        ("exact", " a dull day\n", True),
        ("exact", "a dull days", False),
        ("json", '{"a": [1]}', True),
        ("json", "null", True),
        ("json", 'Sure: {"a": 1}', False),
        ("regex:^a .* day$", "a dull day", True),
        ("regex:^day", "a dull day", False),
    ],
)
def test_check(name, answer, passes):
    assert build_answer_check(name)(answer, "a dull day") is passes


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"type": "object", "required": ["word"], "properties": {"word": {"type": "string"}}}))
    check = build_answer_check(f"json-schema:{file}")
    assert [check(a, "") for a in ('{"word": "a"}', '{"word": 1}', "{}", "word")] == [True, False, False, False]
    file.write_text('{"type": "objekt"}')
    with pytest.raises(UsageError, match=r"JSON.*'objekt'"):
        build_answer_check(f"json-schema:{file}")
    with pytest.raises(UsageError, match=r"none\.json"):
        build_answer_check(f"json-schema:{tmp_path / 'none.json'}")


def test_chrf_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.sentence_chrf("a dull dog", ["a dull day"]).score
    assert build_answer_check("chrf")("a dull dog", "a dull day") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("one two three", 0), ("a b c d e f", 0), ("a b c d a b c d", 1 / 5), ("no " * 100, 96 / 97)],
)
def test_repetition(text, share):
    assert measure_repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", r"no check 'exakt'; did you mean 'exact'"),
        ("regex", r"no check 'regex'; did you mean 'regex:PATTERN'"),
        ("exact:x", "no check"),
        ("regex:(", r"'\(' is not a regular expression"),
    ],
)
def test_bad_check(name, message):
    with pytest.raises(UsageError, match=message):
        build_answer_check(name)


@pytest.mark.parametrize(("name", "package"), [("chrf", "sacrebleu"), ("json-schema:x", "jsonschema")])
def test_missing_package(monkeypatch, name, package):
    for module in (package, "sacrebleu.metrics.chrf"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(ModelError, match=package):
        build_answer_check(name)
