"""Answers side by side: those of `generate`, how they ended, and their checks."""

import json

import pytest
from hand_run import TALKS, make_run, write_rows

from slimtune.data.dataset import Row
from slimtune.errors import UsageError
from slimtune.evaluation.answers import sample_prompts, summarize_checks
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.generate import Generator


def test_answers_are_those_that_each_prompt_alone_gets(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    result = evaluate(run, EvalSettings(generate=3, max_new_tokens=12, checks=["exact", "regex:."]))
    found = result["generations"]
    assert [g["line"] for g in found] == [1, 3, 5]
    generator = Generator.open(run)
    for one in found:
        assert one["prompt"] == [{"role": "user", "content": TALKS[one["line"] - 1][0]}]
        assert one["reference"] == TALKS[one["line"] - 1][1]
        for who in ("base", "tuned"):
            assert one[who] == generator.generate(one["prompt"], tuned=who == "tuned", max_new_tokens=12)
        assert set(one["checks"]) == {"tokens", "repetition", "ended", "exact", "regex:."}
    assert any(g["base"] != g["tuned"] for g in found)
    assert result["generation_summary"]["tokens"]["base"] == sum(g["checks"]["tokens"]["base"] for g in found) / 3
    kept = json.loads((run / "eval-test.json").read_text())
    assert kept["generations"] == found


def test_answer_reports_whether_it_ended(tmp_path, tiny_folder):
    generator = Generator.open(make_run(tmp_path / "run", tiny_folder))
    ask = [{"role": "user", "content": "Define hope."}]
    steps = []

    def say_the_end(module, args, kwargs, out):
        steps.append(1)
        out.logits[..., 65 if len(steps) < 3 else 2] = 1e4

    hook = generator.model.register_forward_hook(say_the_end, with_kwargs=True)
    ended = generator.answer(ask, max_new_tokens=9)
    steps.clear()
    cut = generator.answer(ask, max_new_tokens=2)
    hook.remove()
    assert (ended.tokens, ended.ended, len(ended.text)) == (3, True, 2)
    assert (cut.tokens, cut.ended) == (2, False)


def test_prompts_are_spread_over_the_rows():
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows = [Row(talk, line) for line in range(1, 101)]
    asked = sample_prompts(rows, [{"line": line} for line in range(11, 61)], 3)
    assert [a.line for a in asked] == [11, 35, 60]
    assert (asked[0].messages, asked[0].reference) == (talk[:3], "d")
    assert len(sample_prompts(rows, [{"line": 1}], 5)) == 1


def test_summary_of_checks():
    checks = [
        {"ended": {"base": b, "tuned": True}, "tokens": {"base": 2, "tuned": n}} for b, n in ((True, 1), (False, 4))
    ]
    assert summarize_checks([{"checks": c} for c in checks]) == {
        "ended": {"base": 0.5, "tuned": 1.0},
        "tokens": {"base": 2.0, "tuned": 2.5},
    }


def test_prompt_without_room_fails_before_scoring(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    long = write_rows(tmp_path / "long.jsonl", [("x" * 400, "y")])
    with pytest.raises(UsageError, match="the model's context holds 512"):
        evaluate(run, EvalSettings(data=long, generate=1))
    assert not (run / "eval-data-long.json").exists()


def test_validation_rows_that_training_set_aside_are_asked(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"validation_fraction": 0.4})
    found = evaluate(run, EvalSettings(split="validation", generate=9, max_new_tokens=2))["generations"]
    assert [g["reference"] for g in found] == [TALKS[g["line"] - 1][1] for g in found]
    assert len(found) == 2
