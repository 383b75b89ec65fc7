"""What is said of a comparison, on results made by hand."""

import pytest
from hand_results import make_comparison, make_difference, make_method

from slimtune.experiments.comparison_report import (
    add_pareto_optimal_costs,
    format_comparison_markdown,
    make_comparison_row_cells,
)
from slimtune.experiments.experiment_results import LearningRateSearch
from slimtune.experiments.method_advice import choose_best_or_cheaper_method, format_method_advice


def advise(methods, pairs=()):
    return format_method_advice(choose_best_or_cheaper_method(methods, pairs))


def test_sentences(screen):
    """How each case of an advice is said; test_method_advice.py says when it is given."""
    dora, lora, ia3 = make_method("dora", 0.50, memory=3, time=90), make_method("lora", 0.49), make_method("ia3", 0.30)
    groups = [
        make_difference("dora", "lora", 0.0, 0.02, beyond=False),
        make_difference("dora", "ia3", 0.1, 0.3, beyond=True),
    ]
    undecided = [make_method("lora", 0.65), make_method("prompt", 0.46, half=0.2)]
    one_seed = [make_method("lora", 0.5, seeds=[1]), make_method("ia3", 0.3, seeds=[1])]
    failed = make_method("lora", 0.5, seeds=[1], ranked=False)
    sentences = [
        advise([dora, lora, ia3], groups),
        advise(undecided, [make_difference("lora", "prompt", -0.01, 0.39, beyond=False)]),
        advise([make_method("lora", 0.5)]),
        advise(one_seed),
        advise([failed]),
        advise([make_method("lora", 0.01)]),
    ]
    screen("compare-advice", "\n".join(sentences) + "\n")


def test_what_does_not_help_is_best_for_nothing():
    methods = [make_method("lora", 0.5), make_method("ia3", -0.2, size=1, memory=1, time=1)]
    methods.append(make_method("full", 0.9, size=1, memory=1, time=1, ranked=False))
    assert [m.front for m in add_pareto_optimal_costs(methods)] == [["memory", "size", "time"], [], []]


@pytest.mark.parametrize("incomplete", [False, True])
def test_markdown_table(incomplete, screen):
    lora = make_method("lora", 0.5, front=["memory", "size"], seeds=[1] if incomplete else [1, 2])
    searched = {"lora": LearningRateSearch(rate=2e-4, at_the_edge=incomplete, trials=[])}
    result = make_comparison(lora, make_method("ia3", 0.4, seeds=[1, 2]), searched=searched)
    assert make_comparison_row_cells(lora) == (
        "lora", "0.0002 default", "1.25 %", "10.0 MiB", "2.0 GiB", "1 min 0 s", "4.000", "0.500 [0.480, 0.520]",
        "memory, size",
    )  # fmt: skip
    screen(f"compare-table{'-incomplete' * incomplete}", format_comparison_markdown(result))
