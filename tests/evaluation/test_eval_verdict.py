"""Verdicts on runs that were trained on proper answers, on shuffled answers, and at the cost of other text."""

import json
from typing import Any

import pytest
from trained_runs import KNOWN, knowing_base, shuffled, talks, trained_run
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.evaluation.evaluate import EvalSettings, evaluate, make_verdict


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return knowing_base(tmp_path_factory.mktemp("verdict") / "base", tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="module")
def proper(base):
    return trained_run(base.with_name("proper"), base, talks(200))


@pytest.fixture(scope="module")
def style(base):
    return trained_run(base.with_name("style"), base, shuffled(talks(200)))


def test_proper_run_is_improved(proper):
    found = evaluate(proper)
    use = found["prompt_dependence"]
    assert found["tuned_accuracy"] > 0.95 > 0.5 > found["base_accuracy"]
    assert use["passed"]
    assert use["tuned_ci95"][0] > 0.1 > use["base"]
    assert found["improved"]
    assert found["verdict"] == {"passed": True, "reasons": []}


def test_style_from_shuffled_answers_is_not_improved(style):
    found = evaluate(style)
    assert found["loss_reduction_ci95"][0] > 0.3
    assert found["accuracy_gain_ci95"][0] > 0.3
    assert abs(found["prompt_dependence"]["tuned"]) < 0.01
    assert not found["improved"]
    (reason,) = found["verdict"]["reasons"]
    assert "the prompt is not shown to help the tuned model" in reason
    allowed = evaluate(style, EvalSettings(skip_prompt_test=True))
    assert allowed["prompt_dependence"] is None
    assert allowed["verdict"]["passed"]


def test_forgetting_over_the_budget_fails(proper):
    text = proper.with_name("known.txt")
    text.write_text(KNOWN)
    done = slimtune("eval", str(proper), "--general-text", str(text), "--json")
    assert done.exit_code == 1, done.stderr
    printed = json.loads(done.stdout)
    assert printed["improved"]
    assert printed["forgetting"]["base_loss"] < 2 < printed["forgetting"]["tuned_loss"]
    assert printed["forgetting"]["change_ci95"][0] > 0.1
    assert printed["forgetting"]["within"] is False
    assert printed["verdict"]["passed"] is False
    assert "forgot more than its budget of 0.1 nats per token on general text" in printed["verdict"]["reasons"][0]
    assert json.loads((proper / "eval-test.json").read_text()) == printed
    enough = slimtune("eval", str(proper), "--general-text", str(text), "--forgetting-budget", "20")
    assert enough.exit_code == 0, enough.stderr
    assert "the tuned model is better" in enough.stdout


def result(**figures: Any) -> dict[str, Any]:
    use = {"base": 0.2, "tuned": 0.2, "tuned_ci95": [0.1, 0.3], "change_ci95": [-0.1, 0.1], "passed": True}
    return {"loss_reduction_ci95": [0.1, 0.2], "prompt_dependence": use, "forgetting": None, **figures}


LOST = {"base": 0.13, "tuned": 0.05, "tuned_ci95": [0.03, 0.08], "change_ci95": [-0.13, -0.04], "passed": False}
OVER = {"change": 0.3, "change_ci95": [0.2, 0.4], "budget": 0.1, "within": False}


@pytest.mark.parametrize(
    ("figures", "reasons"),
    [
        ({}, []),
        ({"prompt_dependence": None}, []),
        ({"forgetting": {**OVER, "within": True}}, []),
        ({"loss_reduction_ci95": [0.0, 0.0]}, ["is not shown to be better than the base"]),
        ({"loss_reduction_ci95": [-0.2, 0.1]}, ["between -0.2000 and 0.1000 nats per token"]),
        ({"loss_reduction_ci95": [-0.2, -0.1]}, ["is worse than the base"]),
        ({"prompt_dependence": LOST}, ["from 0.1300 to 0.0500 nats per token, by 0.0400 to 0.1300"]),
        (
            {"prompt_dependence": LOST, "forgetting": OVER},
            ["depends less on its prompts", "0.3000, between 0.2000 and 0.4000"],
        ),
    ],
)
def test_verdict_gives_each_reason(figures, reasons):
    found = make_verdict(result(**figures))
    assert found["passed"] is (not reasons)
    assert len(found["reasons"]) == len(reasons)
    for reason, expected in zip(found["reasons"], reasons, strict=True):
        assert expected in reason


def slimtune(*arguments: str):
    return CliRunner().invoke(app, list(arguments))
