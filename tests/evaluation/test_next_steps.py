"""What mends an evaluation that does not pass."""

from dataclasses import replace

import pytest
from hand_results import make_sft_result

from slimtune.core.config import Recipe
from slimtune.evaluation.estimate import Estimate
from slimtune.evaluation.eval_result import (
    EvalVerdict,
    ForgettingMeasures,
    PolicyEvalResult,
    PolicyMeasures,
    RewardProbe,
)
from slimtune.evaluation.next_steps import list_next_steps

RECIPE = Recipe.from_dict({
    "model": {"name": "smollm2-135m"}, "data": {"train": "rows.jsonl"}, "output_dir": "runs/mine",
    "train": {"learning_rate": 9.3e-4},
})  # fmt: skip
FORGOT = ForgettingMeasures(
    tokens=100, base_loss=Estimate(3, (3, 3)), tuned_loss=Estimate(3.58, (3.5, 3.6)), change=Estimate(0.58, (0.5, 0.6)),
    text="t", budget=0.1, within=False, kinds={},
)  # fmt: skip
BETTER, WORSE = {}, {"loss_reduction": Estimate(-0.2, (-0.3, -0.1))}
UNCLEAR = {"loss_reduction": Estimate(0.0, (-0.1, 0.1))}


def flags_of(measures: dict, recipe: Recipe | None = RECIPE, **fields: object) -> list[str]:
    result = make_sft_result(**measures)
    result = replace(result, verdict=EvalVerdict(passed=False), **{"improved": not measures, **fields})
    return [step.command.split(" ", 5)[-1] for step in list_next_steps(result, recipe)]


def test_a_result_that_passes_needs_no_step():
    assert list_next_steps(make_sft_result(), RECIPE) == []


@pytest.mark.parametrize(
    ("measures", "fields", "flags"),
    [
        (BETTER, {"forgetting": FORGOT}, ["--forgetting-budget 0.02", "--lr 0.0003"]),
        (WORSE, {}, ["--lr 0.0002"]),
        (UNCLEAR, {}, ["--epochs 6"]),
    ],
)
def test_numbers_follow_from_the_run(measures, fields, flags):
    assert flags_of(measures, **fields) == flags


@pytest.mark.parametrize(
    ("gain", "probe_gain", "flags"), [(0.1, -0.2, "--max-steps 20"), (-0.1, -0.2, "--lr 0.0002"), (0.1, 0.3, "")]
)
def test_rewards_that_pay_for_nothing_are_not_trained_longer(gain, probe_gain, flags):
    def make(value):
        return Estimate(value, (value - 0.15, value + 0.15))

    measures = PolicyMeasures(
        rows=20, different_rows=20, answers=4, rewards=["short"], base_reward=make(0), tuned_reward=make(gain),
        reward_gain=make(gain), base_best_reward=make(0), tuned_best_reward=make(0), best_reward_gain=make(0),
        base_length=9.0, tuned_length=9.0,
        probes=[RewardProbe(name="empty", answers="no answer", reward=0.0, gain=make(probe_gain))],
    )  # fmt: skip
    result = PolicyEvalResult(
        run="runs/mine", task="grpo", split="test", data="rows.jsonl", training_rows=0, measures=measures,
        improved=False, verdict=EvalVerdict(passed=False), dropped=0, truncated=0, dtype="float32", quantization=None,
    )  # fmt: skip
    recipe = replace(RECIPE, train=replace(RECIPE.train, max_steps=10))
    (step,) = list_next_steps(result, recipe)
    assert step.command == f"slimtune train runs/mine/recipe.yaml --out runs/mine-2 {flags}".rstrip()


def test_a_budget_that_was_kept_in_training_shrinks_by_what_was_forgotten():
    recipe = replace(RECIPE, train=replace(RECIPE.train, forgetting_budget=0.05))
    assert flags_of(BETTER, recipe, forgetting=FORGOT)[0] == "--forgetting-budget 0.009"


def test_too_few_rows_are_mended_by_more_even_without_a_recipe():
    few = make_sft_result(different_rows=3)
    (step,) = list_next_steps(replace(few, verdict=EvalVerdict(passed=False), improved=False), None)
    assert step.command == "slimtune eval runs/mine --data held_out.jsonl"


def test_the_commands_train_the_same_recipe_into_another_folder():
    result = replace(make_sft_result(**UNCLEAR), verdict=EvalVerdict(passed=False), improved=False)
    (step,) = list_next_steps(result, RECIPE)
    assert step.command == "slimtune train runs/mine/recipe.yaml --out runs/mine-2 --epochs 6"
