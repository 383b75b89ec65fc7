"""What is said of a comparison, on results made by hand."""

import pytest
from hand_results import make_comparison, make_difference, make_method

from slimtune.experiments.comparison_report import format_comparison_markdown, format_comparison_row, mark_pareto_fronts
from slimtune.experiments.experiment_results import RateSearch
from slimtune.experiments.method_advice import choose_method, format_advice


def advise(methods, pairs=()):
    return format_advice(choose_method(methods, pairs))


def test_sentence_of_all_groups():
    methods = [
        make_method("dora", 0.50, memory=3, time=90),
        make_method("lora", 0.49),
        make_method("ia3", 0.30, size=1),
    ]
    pairs = [
        make_difference("dora", "lora", 0.0, 0.02, beyond=False),
        make_difference("dora", "ia3", 0.1, 0.3, beyond=True),
    ]
    assert advise(methods, pairs) == (
        "Take lora (loss reduction 0.490 nats per token, 0.470 to 0.510; 2.0 GiB, a file of 10.0 MiB, 1 min 0 s per "
        "run); dora and lora are as good as one another, within a tenth of the loss reduction; ia3 is worse than dora "
        "by 0.200 nats per token."
    )


def test_sentence_of_undecided_methods():
    methods = [make_method("lora", 0.65), make_method("prompt", 0.46, half=0.2)]
    sentence = advise(methods, [make_difference("lora", "prompt", -0.01, 0.39, beyond=False)])
    assert "prompt does not differ from lora beyond noise, but may be up to 0.390 worse: more seeds" in sentence


def test_sentence_of_one_method_or_one_seed():
    assert advise([make_method("lora", 0.5)]) == (
        "Only lora was measured: loss reduction 0.500 nats per token, 0.480 to 0.520."
    )
    methods = [make_method("lora", 0.5, seeds=[1]), make_method("ia3", 0.3, seeds=[1])]
    assert advise(methods) == (
        "No method is proven to be the best: with one seed, the effect of another seed is unknown (--seeds 3 measures "
        "it); with this one lora has the highest loss reduction (0.500 nats per token, 0.480 to 0.520); ia3 is behind "
        "by 0.200."
    )


def test_sentence_without_a_choice():
    failed = make_method("lora", 0.5, seeds=[1], ranked=False)
    assert advise([failed]) == (
        "No method has finished its runs, so there is nothing to advise. Not ranked, because a run failed: lora."
    )
    assert advise([make_method("lora", 0.01)]).startswith("Take none of them: the loss reduction of the best, lora,")
    assert format_comparison_row(failed)[-1] == "not ranked"


def test_what_does_not_help_is_best_for_nothing():
    methods = [make_method("lora", 0.5), make_method("ia3", -0.2, size=1, memory=1, time=1)]
    methods.append(make_method("full", 0.9, size=1, memory=1, time=1, ranked=False))
    assert [m.front for m in mark_pareto_fronts(methods)] == [["memory", "size", "time"], [], []]


@pytest.mark.parametrize("incomplete", [False, True])
def test_markdown_table(incomplete):
    lora = make_method("lora", 0.5, front=["memory", "size"], seeds=[1] if incomplete else [1, 2])
    searched = {"lora": RateSearch(rate=2e-4, at_the_edge=incomplete, trials=[])}
    result = make_comparison(lora, make_method("ia3", 0.4, seeds=[1, 2]), searched=searched)
    assert format_comparison_row(lora) == (
        "lora", "0.0002 default", "1.25 %", "10.0 MiB", "2.0 GiB", "1 min 0 s", "4.000", "0.500 [0.480, 0.520]",
        "memory, size",
    )  # fmt: skip
    table = format_comparison_markdown(result)
    assert "3 steps, 1,000 to 1,010 trained tokens per run, 2 seeds; 9 held-out rows" in table
    assert "| ia3 | 0.0002 default | 1.25 % |" in table
    assert table.endswith("Take lora.\n")
    assert ("lora has 1 of 2 seeds, so it is not ranked." in table) == incomplete
    assert ("lies at the edge of the searched range" in table) == incomplete
