"""Which method is chosen, on results made by hand."""

from hand_results import make_difference, make_method

from slimtune.experiments.method_advice import choose_best_or_cheaper_method


def names(methods):
    return [m.method for m in methods]


def test_cheaper_of_equally_good():
    methods = [
        make_method("dora", 0.50, memory=3, time=90),
        make_method("lora", 0.49),
        make_method("ia3", 0.30, size=1),
    ]
    pairs = [
        make_difference("dora", "lora", 0.0, 0.02, beyond=False),
        make_difference("dora", "ia3", 0.1, 0.3, beyond=True),
    ]
    advice = choose_best_or_cheaper_method(methods, pairs)
    assert (advice.comparison_status, advice.best.method, advice.choice.method) == ("compared", "dora", "lora")
    assert (names(advice.as_good), names(advice.undecided), names(advice.worse)) == (["lora"], [], ["ia3"])
    assert advice.cheaper == {}


def test_wide_interval_is_not_as_good():
    methods = [
        make_method("lora", 0.65), make_method("bottleneck", 0.59), make_method("prompt", 0.46, size=1, memory=1)
    ]  # fmt: skip
    pairs = [
        make_difference("lora", "bottleneck", 0.04, 0.08, beyond=True),
        make_difference("lora", "prompt", -0.01, 0.39, beyond=False),
        make_difference("bottleneck", "prompt", -0.07, 0.33, beyond=False),
    ]
    advice = choose_best_or_cheaper_method(methods, pairs)
    assert advice.choice.method == "lora"
    assert (names(advice.as_good), names(advice.undecided), names(advice.worse)) == ([], ["prompt"], ["bottleneck"])
    assert advice.largest_gaps["prompt"] == 0.39


def test_a_cost_that_another_has_lower_is_kept():
    methods = [
        make_method("a", 0.5, size=1), make_method("b", 0.49, time=10, memory=1), make_method("c", 0.48, memory=3)
    ]  # fmt: skip
    pairs = [make_difference("a", "b", 0, 0.03, beyond=False), make_difference("a", "c", 0.01, 0.03, beyond=True)]
    advice = choose_best_or_cheaper_method(methods, pairs)
    assert (advice.choice.method, names(advice.as_good)) == ("b", ["b", "c"])
    assert {cost: method.method for cost, method in advice.cheaper.items()} == {"size": "a"}


def test_costs_within_a_tenth_are_equal():
    methods = [make_method("a", 0.5, time=62), make_method("b", 0.49, time=60)]
    assert (
        choose_best_or_cheaper_method(methods, [make_difference("a", "b", 0, 0.03, beyond=False)]).choice.method == "a"
    )


def test_clear_winner_is_taken_at_any_cost():
    methods = [make_method("full", 0.9, memory=5, size=270), make_method("lora", 0.5), make_method("ia3", 0.4)]
    pairs = [
        make_difference("full", "lora", 0.3, 0.5, beyond=True),
        make_difference("full", "ia3", 0.4, 0.6, beyond=True),
    ]
    advice = choose_best_or_cheaper_method(methods, pairs)
    assert (advice.choice.method, names(advice.worse)) == ("full", ["lora", "ia3"])


def test_gain_within_noise():
    methods = [make_method("lora", 0.01), make_method("ia3", 0.0)]
    advice = choose_best_or_cheaper_method(methods, [make_difference("lora", "ia3", -0.1, 0.1, beyond=False)])
    assert (advice.comparison_status, advice.choice) == ("no proven gain", None)
    assert choose_best_or_cheaper_method([], []).comparison_status == "nothing finished"


def test_one_method_or_one_seed():
    advice = choose_best_or_cheaper_method([make_method("lora", 0.5)], [])
    assert (advice.comparison_status, advice.choice.method) == ("one method", "lora")
    methods = [make_method("lora", 0.5, seeds=[1]), make_method("ia3", 0.3, seeds=[1])]
    advice = choose_best_or_cheaper_method(methods, [make_difference("lora", "ia3", 0.1, 0.3, beyond=True)])
    assert (advice.comparison_status, advice.choice, names(advice.undecided)) == ("one seed", None, ["ia3"])


def test_what_failed_is_not_ranked():
    methods = [make_method("ia3", 0.3), make_method("lora", 0.5, seeds=[1], ranked=False)]
    advice = choose_best_or_cheaper_method(methods, [])
    assert (advice.comparison_status, advice.choice.method, names(advice.not_ranked)) == ("one method", "ia3", ["lora"])
    assert choose_best_or_cheaper_method(methods[1:], []).comparison_status == "nothing finished"
