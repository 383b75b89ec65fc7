"""Rewards that come with slimtune, and the names by which recipes choose them."""

import json

import pytest

from slimtune.extras.rewards.builtin_rewards import BUILTIN_REWARDS, find_last_number
from slimtune.extras.rewards.reward_specs import find_reward_error, load_reward, make_short_reward_name


def score(spec, completions, **columns):
    return load_reward(spec)(prompts=["?"] * len(completions), completions=completions, **columns)


def test_exact_match():
    assert score("exact-match", [" yes ", "yes!", "7"], answer=["yes", "yes", 7]) == [1, 0, 1]
    assert score("exact-match:right", ["a"], right=["a"]) == [1]
    with pytest.raises(LookupError):
        score("exact-match:rihgt", ["a"], right=["a"])


def test_numeric_match():
    answers = ["It is 12.", "12 or 13", "1,200.0", "none", "-3"]
    assert score("numeric-match", answers, answer=[12, 12, "#### 1200", 1, -3]) == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(("text", "number"), [("3 + 4 = 7.", 7), ("1e3", 1000), (".5", 0.5), ("", None)])
def test_last_number(text, number):
    assert find_last_number(text) == number


def test_regex_matches_the_whole_answer_in_limited_time():
    assert score(r"regex:<a>.*</a>", ["<a>x\ny</a> ", "<a>x</a> more"]) == [1, 0]
    with pytest.raises(TimeoutError):
        score("regex:(a|aa)+b", ["a" * 200])


def test_json_schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["city"]}))
    assert score(f"json-schema:{file}", ['{"city": "Bonn"}', '{"town": 1}', "Bonn"]) == [1, 0, 0]


def test_length():
    assert score("length:4", ["", "abcd", "abcdef", "abcdefgh", "a" * 99]) == [1, 1, 0.5, 0, 0]


@pytest.mark.parametrize(
    "spec", ["", "numeric", "regex", "regex:(", "json-schema:nowhere.json", "length:-1", "nowhere.py:f", "rewards.py"]
)
def test_faulty_name_is_an_error(spec):
    assert find_reward_error(spec) is not None


def test_names(tmp_path):
    assert make_short_reward_name("a/rewards.py:right") == "right"
    assert make_short_reward_name("numeric-match:answer") == "numeric-match"
    assert all(name == name.lower() for name in BUILTIN_REWARDS)
