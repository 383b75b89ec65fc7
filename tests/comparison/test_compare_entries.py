"""Names people give, settings of single methods, and every refusal."""

from __future__ import annotations

import pytest

from slimtune.comparison.candidates import FULL_RATE, build_candidates, split_settings
from slimtune.errors import ConfigError, UsageError
from slimtune.methods import config_class, method_names

LORA = {"method": {"name": "lora", "rank": 16}}


def test_variants_short_names_and_full():
    found = {e.label: e for e in build_candidates(["lora", "dora", "prefix", "full", "lora"], LORA, {})}
    assert list(found) == ["lora", "dora", "prefix", "full"]
    assert (found["dora"].method, found["dora"].settings) == ("lora", {"r": 16, "use_dora": True})
    assert found["lora"].settings == {"r": 16}
    assert (found["prefix"].method, found["prefix"].settings) == ("prefix_tuning", {})
    assert found["prefix"].rate == config_class("prefix_tuning").learning_rate
    assert (found["full"].rate, found["full"].rate_from, found["full"].is_full) == (FULL_RATE, "default", True)


def test_all_is_every_method_and_full():
    found = build_candidates(["ia3", "all"], {}, {})
    assert [e.label for e in found] == ["ia3", *(n for n in method_names() if n != "ia3"), "full"]
    assert [e.label for e in found if not e.by_all] == ["ia3"]


def test_settings_of_single_methods():
    found = {e.label: e for e in build_candidates(["lora", "dora"], LORA, {"dora.r": 4, "lora.learning_rate": "1e-3"})}
    assert found["dora"].settings == {"r": 4, "use_dora": True}
    assert (found["lora"].rate, found["lora"].rate_from) == (1e-3, "given")
    assert found["dora"].rate_from == "default"


def test_set_is_the_recipes_or_a_methods():
    pairs = [("train.batch_size", 4), ("model", "m"), ("dora.r", 4)]
    assert split_settings(pairs) == ({"train.batch_size": 4, "model": "m"}, {"dora.r": 4})


def test_unknown_names_all_at_once():
    with pytest.raises(UsageError) as caught:
        build_candidates(["lore", "lora", "prefixx"], LORA, {})
    assert "'lore', did you mean 'lora'?" in caught.value.message
    assert "'prefixx', did you mean 'prefix'?" in caught.value.message


@pytest.mark.parametrize(
    ("labels", "given", "says"),
    [
        ([], {}, "--methods names none"),
        (["lora"], {"ia3.r": 4}, "'ia3' is neither compared nor a section"),
        (["lora"], {"trian.epochs": 4}, "did you mean 'train'"),
        (["full"], {"full.r": 4}, "full fine-tuning has no setting 'r'"),
        (["lora"], {"lora.learning_rate": -1}, "lora.learning_rate is -1"),
        (["lora"], {"lora.learning_rate": "fast"}, "lora.learning_rate is 'fast'"),
    ],
)
def test_faulty_settings(labels, given, says):
    with pytest.raises((UsageError, ConfigError), match=says):
        build_candidates(labels, LORA, given)
