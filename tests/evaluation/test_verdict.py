"""Verdicts on runs that were trained on proper answers, on shuffled answers, and at the cost of other text."""

import json

import pytest
from trained_runs import KNOWN, make_talks, shuffle_answers, train_base, train_run
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.evaluation.evaluate import EvalSettings, evaluate, make_pass_verdict
from slimtune.evaluation.sft_comparison import SupervisedEvaluation


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return train_base(tmp_path_factory.mktemp("verdict") / "base", tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="module")
def proper(base):
    return train_run(base.with_name("proper"), base, make_talks(200))


def test_proper_run_is_improved(proper):
    found = evaluate(proper)
    assert found["tuned_accuracy"] > 0.95 > 0.5 > found["base_accuracy"]
    assert found["prompt_dependence"]["tuned_ci95"][0] > 0.1 > found["prompt_dependence"]["base"]
    assert found["improved"]
    assert found["verdict"]["passed"]
    assert not found["verdict"]["reasons"]


@pytest.mark.slow
def test_style_from_shuffled_answers_is_not_improved(base):
    style = train_run(base.with_name("style"), base, shuffle_answers(make_talks(200)))
    found = evaluate(style)
    assert found["loss_reduction_ci95"][0] > 0.3
    assert found["accuracy_gain_ci95"][0] > 0.3
    assert abs(found["prompt_dependence"]["tuned"]) < 0.01
    assert not found["improved"]
    (reason,) = found["verdict"]["reasons"]
    assert "the prompt is not shown to help the tuned model" in reason
    allowed = evaluate(style, EvalSettings(skip_prompt_test=True))
    assert (allowed["prompt_dependence"], allowed["verdict"]["passed"]) == (None, True)


def test_forgetting_over_the_budget_fails(proper):
    text = proper.with_name("known.txt")
    text.write_text(KNOWN)
    done = CliRunner().invoke(app, ["eval", str(proper), "--general-text", str(text), "--json"])
    assert done.exit_code == 1, done.stderr
    printed = json.loads(done.stdout)
    assert printed["improved"]
    assert printed["forgetting"]["base_loss"] < 2 < printed["forgetting"]["tuned_loss"]
    assert not printed["forgetting"]["within"]
    assert not printed["verdict"]["passed"]
    assert "forgot more than its budget of 0.1 nats per token on general text" in printed["verdict"]["reasons"][0]
    assert json.loads((proper / "eval-test.json").read_text()) == printed
    assert evaluate(proper, EvalSettings(general_text=text, forgetting_budget=20))["verdict"]["passed"]


KEPT = {"base": 0.2, "tuned": 0.2, "tuned_ci95": [0.1, 0.3], "change_ci95": [-0.1, 0.1], "passed": True}
LOST = {"base": 0.13, "tuned": 0.05, "tuned_ci95": [0.03, 0.08], "change_ci95": [-0.13, -0.04], "passed": False}
OVER = {"change": 0.3, "change_ci95": [0.2, 0.4], "budget": 0.1, "within": False}


PASSES = {"loss_reduction_ci95": [0.1, 0.2], "prompt_dependence": KEPT, "forgetting": None, "different_rows": 20}


@pytest.mark.parametrize(
    ("figures", "warning"),
    [
        ({}, ""),
        ({"different_rows": 19}, "over only 19 rows: under about 20 the intervals are too narrow"),
        ({"different_rows": 6, "generations": None}, "are too narrow; read some answers: --generate 5"),
        ({"different_rows": 6, "forgetting": OVER}, ""),
    ],
)
def test_warning_of_few_rows(figures, warning):
    assert make_pass_verdict({**PASSES, **figures}, [])["warning"].endswith(warning)


@pytest.mark.parametrize(
    ("figures", "reasons"),
    [
        ({}, []),
        ({"prompt_dependence": None}, []),
        ({"forgetting": {**OVER, "within": True}}, []),
        ({"loss_reduction_ci95": [0.0, 0.0]}, ["is not shown to be better than the base"]),
        ({"loss_reduction_ci95": [-0.2, -0.1]}, ["is worse than the base"]),
        ({"prompt_dependence": LOST}, ["from 0.1300 to 0.0500 nats per token, by 0.0400 to 0.1300"]),
        ({"prompt_dependence": {**LOST, "change_ci95": [-0.08, -0.08]}}, ["from 0.1300 to 0.0500 nats per token."]),
        ({"prompt_dependence": LOST, "forgetting": OVER}, ["depends less on its prompts", "between 0.2000 and 0.4000"]),
    ],
)
def test_reasons(figures, reasons):
    result = {**PASSES, **figures}
    verdict = make_pass_verdict(result, SupervisedEvaluation.list_reasons_not_passed(result))
    assert verdict["passed"] is (not reasons)
    for reason, expected in zip(verdict["reasons"], reasons, strict=True):
        assert expected in f"{reason}."
