"""Patterns of configs: they match what `re` matches, in bounded time, and a malformed one is quoted."""

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.core.adapters.name_patterns import ModuleNameRegex, find_matching_pattern
from slimtune.core.adapters.targets import get_layer_index
from slimtune.errors import ConfigError

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a.]", r"\d", r"\w", "^", "$", r"\b", "(?=a)", "(?!b)", "(?<=a)", r"(?<!\.)"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{2,}"]
expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=8,
)
NAMES = [f"model.layers.{i}.{m}" for i in range(40) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]


@given(expressions, st.text("ab.1", max_size=7))
def test_the_same_matches_as_re(text, name):
    starts = (0, *(i + 1 for i, c in enumerate(name) if c == "."))
    for some in ((0,), starts):
        assert ModuleNameRegex(text).matches(name, some) == any(re.compile(text).fullmatch(name, s) for s in some)


@pytest.mark.parametrize(
    "text",
    ["(.*)*!", "(([a-z0-9_.])+)+!", "(a|a)*(.*)*(.+)+!", "(?=(.*)*!)" * 50 + "x", "a?" * 30 + "a" * 30,
     "((.{1,60}){1,60}){60}!", "(" * 60 + "a" + "+)+" * 60],
)  # fmt: skip
def test_endless_patterns_end(text):
    started = time.process_time()
    with contextlib.suppress(ConfigError):
        assert not any(ModuleNameRegex(text).matches(name) for name in NAMES)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("*.q_proj", r"'\*.q_proj' is not a regular expression: nothing to repeat at position 0"),
        ("*.q_proj", r"'\.\*q_proj' for every name that ends with q_proj, or a list of names: \[q_proj\]"),
        ("(", r"missing \), unterminated subpattern at position 0"),
        ("[q_proj", "unterminated character set at position 0"),
        ("a{99999999999999999999}", "nested too deeply or repeats too often"),
        ("(" * 3000 + ")" * 3000, "nested too deeply or repeats too often"),
        ("a" * 20_001, "20001 characters"),
    ],
)
def test_malformed(text, words):
    with pytest.raises(ConfigError, match=words):
        ModuleNameRegex(text)


def test_end_of_a_name():
    assert find_matching_pattern(["v", "q_proj"], "model.q_proj") == "q_proj"
    assert find_matching_pattern(["^q_proj", "eq_proj"], "model.q_proj") is None


def test_layer_index():
    assert get_layer_index("h.3", None) == 3
    assert get_layer_index("layers.0.experts.3.up", None) == 3  # as in PEFT
    assert get_layer_index("vision.0.layers.5.up", "layers") == 5
    assert get_layer_index("vision.0.layers.5.up", "(.*)*!") is None
