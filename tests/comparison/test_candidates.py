"""Names of methods, settings of single methods, and every refusal."""

import pytest

from slimtune.comparison.candidates import build_candidates, split_settings
from slimtune.errors import ConfigError, UsageError
from slimtune.methods import method_names

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
    assert {c.label for c in found} == set(method_names())
    assert [c.label for c in found if not c.from_all] == ["ia3"]


def test_overrides_of_single_methods():
    pairs = [("train.batch_size", 4), ("model", "m"), ("dora.r", 4), ("lora.learning_rate", "1e-3")]
    of_recipe, overrides = split_settings(pairs)
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
