"""What users type: names of methods and tasks, settings of single ones, ranges of `--over`, and every refusal."""

import pytest

from slimtune.core.adapters.method_registry import list_methods
from slimtune.errors import ConfigError, UsageError
from slimtune.experiments.candidates import build_candidates, split_settings_by_recipe_section
from slimtune.experiments.search_space import parse_setting_ranges

LORA = {"method": {"name": "lora", "rank": 16}}


def test_variants_and_short_names():
    found = {c.label: c for c in build_candidates(["lora", "dora", "prefix", "full", "lora"], LORA, {})}
    assert list(found) == ["lora", "dora", "prefix", "full"]
    assert (found["dora"].method, found["dora"].settings) == ("lora", {"r": 16, "use_dora": True})
    assert found["lora"].settings == {"r": 16}
    assert (found["prefix"].method, found["prefix"].settings) == ("prefix_tuning", {})
    assert (found["full"].learning_rate, found["full"].rate_source) == ("auto", "default")


def test_all_is_every_method():
    found = build_candidates(["ia3", "all"], {}, {})
    assert {c.label for c in found} == set(list_methods())
    assert [c.label for c in found if not c.from_all] == ["ia3"]


def test_overrides_of_single_methods():
    pairs = [("train.batch_size", 4), ("model", "m"), ("dora.r", 4), ("lora.learning_rate", "1e-3")]
    of_recipe, overrides = split_settings_by_recipe_section(pairs)
    assert of_recipe == {"train.batch_size": 4, "model": "m"}
    found = {c.label: c for c in build_candidates(["lora", "dora"], LORA, overrides)}
    assert found["dora"].settings == {"r": 4, "use_dora": True}
    assert (found["lora"].learning_rate, found["lora"].rate_source) == (1e-3, "given")
    assert found["dora"].rate_source == "default"


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        ([], {}, "--methods names no method"),
        (["lore", "lora", "prefixx"], {}, "'lore', did you mean 'lora'?; 'prefixx', did you mean 'prefix'?"),
        (["lora"], {"ia3.r": 4}, "'ia3' is neither a compared method nor a section"),
        (["lora"], {"trian.epochs": 4}, "did you mean 'train'"),
        (["lora"], {"lora.learning_rate": -1}, "lora.learning_rate is -1"),
        (["lora"], {"lora.learning_rate": "fast"}, "lora.learning_rate is 'fast'"),
    ],
)
def test_wrong_names_and_overrides(labels, overrides, message):
    with pytest.raises((UsageError, ConfigError)) as e:
        build_candidates(labels, LORA, overrides)
    assert message in e.value.message


def test_numbers_choices_and_short_sections():
    rate, rank, targets, method = parse_setting_ranges([
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
        parse_setting_ranges([text])
    assert message in f"{error.value.message} {error.value.expected}"


def test_same_path_twice_and_nothing():
    with pytest.raises(UsageError, match=r"--over method\.r\b"):
        parse_setting_ranges(["method.r=1,2", "method.r=2,4"])
    with pytest.raises(UsageError, match="--over"):
        parse_setting_ranges([])
