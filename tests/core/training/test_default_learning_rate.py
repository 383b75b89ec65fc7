"""The learning rate of runs that name none."""

import pytest

from slimtune.core.config import Recipe
from slimtune.core.training.default_learning_rate import describe_far_learning_rate, fill_in_learning_rate


def make_recipe(**changes) -> Recipe:
    return Recipe.from_dict({"model": "smollm2-135m", "data": "rows.jsonl", "output_dir": "runs/x", **changes})


def test_each_method_has_a_learning_rate():
    def rate(**recipe):
        return fill_in_learning_rate(make_recipe(**recipe), row_count=96, hidden_size=576).train.learning_rate

    assert rate(method="prompt_tuning") == 3e-3
    assert rate(method="prompt_tuning", task="dpo") == 9e-4
    assert rate(method="prompt_tuning", train={"learning_rate": 1e-3}) == 1e-3


@pytest.mark.parametrize(
    ("steps", "hidden_size", "rate"),
    [(12, 576, 4e-3), (48, 576, 2e-3), (5000, 576, 2e-4), (12, 4096, 8.7e-4), (300, 4096, 2e-4), (1, 32, 5e-3)],
)
def test_short_runs_of_lora_and_narrow_bases_have_a_higher_rate(steps, hidden_size, rate):
    def taken(**recipe):
        one_epoch = make_recipe(train={"epochs": 1}, **recipe)
        return fill_in_learning_rate(one_epoch, row_count=8 * steps, hidden_size=hidden_size).train.learning_rate

    assert taken() == rate
    assert 2e-4 <= taken(method={"rank": 64}) <= rate <= taken(method={"rank": 4}) <= 5e-3
    assert taken(method={"init_lora_weights": "pissa"}) == taken(task="classification") == 2e-4
    assert taken(method="full") == 5e-5


def test_rows_that_come_again_lower_the_rate_of_lora():
    def taken(rows):
        recipe = make_recipe(train={"max_steps": 36})
        return fill_in_learning_rate(recipe, row_count=rows, hidden_size=576).train.learning_rate

    assert (taken(288), taken(96), taken(24), taken(1000)) == (2.3e-3, 1e-3, 3.6e-4, 2.3e-3)


@pytest.mark.parametrize(("rate", "is_far"), [(5e-5, True), (2e-2, True), (3e-4, False), (3e-3, False)])
def test_a_rate_is_far_from_the_default_from_ten_times_on(rate, is_far):
    assert bool(describe_far_learning_rate(rate, 1e-3)) == is_far
