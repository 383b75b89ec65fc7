"""Ranges as `--over` gives them."""

import pytest

from slimtune.comparison.space import parse_ranges
from slimtune.errors import UsageError


def test_numbers_choices_and_short_sections():
    rate, rank, targets, method = parse_ranges([
        "train.learning_rate = log:1e-5..1e-2", "method.r=8,16,8", "method.target_modules=[q_proj,v_proj],all-linear",
        "method=lora,ia3",
    ])  # fmt: skip
    assert (rate.low, rate.high, rate.log, str(rate)) == (1e-5, 1e-2, True, "log:1e-05..0.01")
    assert (rank.choices, targets.choices) == ((8, 16), (["q_proj", "v_proj"], "all-linear"))
    assert (method.path, method.choices) == ("method.name", ("lora", "ia3"))
    assert [rate.is_edge(x) for x in (1e-5, 1e-4, 9e-3)] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.r", "--over got 'method.r'"),
        ("method.r=8", "has one value, 8"),
        ("train.warmup_ratio=0.5..0.1", "0.5 is not below 0.1"),
        ("train.warmup_ratio=0..x", "two numbers"),
        ("train.warmup_ratio=0...inf", "two numbers"),
        ("train.learning_rate=log:0..1", "a logarithmic scale has no 0"),
        ("train.learning_rate=log:8", "two numbers"),
        ("method.r=[8,16", "line 1"),
        ("data.max_seq_len=64,128", "rows, tokens and objective"),
        ("model=a,b", "rows, tokens and objective"),
        ("output_dir=a,b", "their own run folders"),
    ],
)
def test_wrong_range(text, message):
    with pytest.raises(UsageError) as error:
        parse_ranges([text])
    assert message in f"{error.value.message} {error.value.expected}"


def test_same_path_twice_and_nothing():
    with pytest.raises(UsageError, match=r"--over method\.r is given twice"):
        parse_ranges(["method.r=1,2", "method.r=2,4"])
    with pytest.raises(UsageError, match="nothing to search"):
        parse_ranges([])
