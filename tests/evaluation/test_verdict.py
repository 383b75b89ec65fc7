"""Verdicts on runs that were trained on proper answers, on shuffled answers, and at the cost of other text."""

import json
from dataclasses import replace

import pytest
from hand_results import make_sft_result
from trained_runs import KNOWN, make_talks, shuffle_answers, train_base, train_run
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.evaluation.estimate import Estimate
from slimtune.evaluation.eval_result import ForgettingMeasures, PromptDependence
from slimtune.evaluation.evaluate import EvalSettings, evaluate, make_pass_fail_eval_verdict
from slimtune.evaluation.sft_comparison import SupervisedLossEvaluator


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return train_base(tmp_path_factory.mktemp("verdict") / "base", tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="module")
def proper(base):
    return train_run(base.with_name("proper"), base, make_talks(200))


def test_proper_run_is_improved(proper):
    found = evaluate(proper)
    assert found.measures.tuned_accuracy.value > 0.95 > 0.5 > found.measures.base_accuracy.value
    assert found.measures.prompt_dependence.tuned.low > 0.1 > found.measures.prompt_dependence.base.value
    assert found.improved
    assert found.verdict.passed
    assert not found.verdict.reasons


@pytest.mark.slow
def test_style_from_shuffled_answers_is_not_improved(base):
    style = train_run(base.with_name("style"), base, shuffle_answers(make_talks(200)))
    found = evaluate(style)
    assert found.measures.loss_reduction.ci95[0] > 0.3
    assert found.measures.accuracy_gain.ci95[0] > 0.3
    assert abs(found.measures.prompt_dependence.tuned.value) < 0.01
    assert not found.improved
    (reason,) = found.verdict.reasons
    assert "prompt" in reason
    allowed = evaluate(style, EvalSettings(skip_prompt_test=True))
    assert (allowed.measures.prompt_dependence, allowed.verdict.passed) == (None, True)


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
    assert "0.1 nats" in printed["verdict"]["reasons"][0]
    assert json.loads((proper / "eval-test.json").read_text()) == printed
    assert evaluate(proper, EvalSettings(general_text=text, forgetting_budget=20)).verdict.passed


def estimate(low: float, high: float, value: float | None = None) -> Estimate:
    return Estimate((low + high) / 2 if value is None else value, (low, high))


def dependence(base: float, tuned: Estimate, change: Estimate, *, passed: bool) -> PromptDependence:
    return PromptDependence(rows=20, base=estimate(base, base), tuned=tuned, change=change, passed=passed)


KEPT = dependence(0.2, estimate(0.1, 0.3), estimate(-0.1, 0.1), passed=True)
LOST = dependence(0.13, estimate(0.03, 0.08, 0.05), estimate(-0.13, -0.04), passed=False)
OVER = ForgettingMeasures(
    text="t", tokens=9, base_loss=1.0, tuned_loss=1.3, change=estimate(0.2, 0.4), budget=0.1, within=False, kinds={}
)


@pytest.mark.parametrize(
    ("measures", "others", "warning"),
    [
        ({}, {"generations": []}, ""),
        ({"different_rows": 19}, {"generations": []}, "over only 19 rows: under about 20 the intervals are too narrow"),
        ({"different_rows": 6}, {"generations": None}, "are too narrow; read some answers: --generate 5"),
        ({"different_rows": 6}, {"forgetting": OVER}, ""),
    ],
)
def test_warning_of_few_rows(measures, others, warning):
    result = replace(make_sft_result(prompt_dependence=KEPT, **measures), **others)
    assert make_pass_fail_eval_verdict(result, []).warning.endswith(warning)


@pytest.mark.parametrize(
    ("measures", "forgetting", "reasons"),
    [
        ({}, None, []),
        ({"prompt_dependence": None}, None, []),
        ({}, replace(OVER, within=True), []),
        ({"loss_reduction": estimate(0.0, 0.0), "rows_better": 1}, None, ["is not shown to be better than the base"]),
        ({"loss_reduction": estimate(-0.2, -0.1)}, None, ["is worse than the base"]),
        ({"prompt_dependence": LOST}, None, ["from 0.1300 to 0.0500 nats per token, by 0.0400 to 0.1300"]),
        (
            {"prompt_dependence": replace(LOST, change=estimate(-0.08, -0.08))},
            None,
            ["from 0.1300 to 0.0500 nats per token."],
        ),
        ({"prompt_dependence": LOST}, OVER, ["depends less on its prompts", "between 0.2000 and 0.4000"]),
    ],
)
def test_reasons(measures, forgetting, reasons):
    result = replace(make_sft_result(**{"prompt_dependence": KEPT, **measures}), forgetting=forgetting)
    verdict = make_pass_fail_eval_verdict(result, SupervisedLossEvaluator.list_reasons_not_better(result.measures))
    assert verdict.passed is (not reasons)
    for reason, expected in zip(verdict.reasons, reasons, strict=True):
        assert expected in f"{reason}."
