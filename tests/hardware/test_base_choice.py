"""Which base to tune on a machine for a purpose."""

from dataclasses import replace

import pytest

from slimtune.hardware.base_choice import PURPOSES, rank_bases_for_purpose
from slimtune.hardware.machine_choice import SCREEN_BYTES
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.known_base_fits import find_known_base_fits
from slimtune.planning.known_bases import list_known_bases

CARD = require_gpu_by_name("rtx-3060-12gb")


@pytest.fixture(scope="module")
def bases():
    families = ("smollm", "falcon3", "qwen3-4b", "qwen3-8b", "qwen2.5-3b", "qwen2.5-coder", "gemma-3-4b", "llama-2-7b")
    return [base for family in families for base in list_known_bases(family)]


@pytest.fixture(scope="module")
def fits(bases):
    return list(find_known_base_fits(bases, CARD))


def rank(purpose, bases, fits, card=CARD):
    return [offer.fit.name for offer in rank_bases_for_purpose(PURPOSES[purpose], bases, fits, card)]


def test_the_largest_answers_people(bases, fits):
    assert rank("chat", bases, fits)[:2] == ["falcon3-10b", "qwen3-8b"]
    assert rank("chat", bases, fits).index("llama-2-7b") > rank("chat", bases, fits).index("gemma-3-4b")  # older


def test_json_is_trained_in_16_bits_first(bases, fits):
    order = rank("json", bases, fits)
    assert order.index("qwen3-4b") < order.index("qwen3-8b")


def test_tools_need_a_template_that_writes_them(bases, fits):
    with_tools = {base.name for base in bases if base.tools}
    assert set(rank("tools", bases, fits)) <= with_tools
    assert "qwen3-8b" in rank("tools", bases, fits)


def test_what_no_business_may_use_and_what_is_for_code_is_left_out(bases, fits):
    assert not {"qwen2.5-3b", "qwen2.5-coder-7b"} & set(rank("chat", bases, fits))


def test_the_screen_keeps_its_memory(bases, fits):
    fit = next(f for f in fits if f.name == "qwen3-4b")
    crowded = [replace(fit, training=replace(fit.training, need_bytes=Interval(1, CARD.memory - SCREEN_BYTES / 2)))]
    assert rank("chat", bases, crowded) == []
    assert rank("chat", bases, crowded, replace(CARD, kind="datacentre")) == ["qwen3-4b"]


def test_of_one_size_the_newer_is_first(bases, fits):
    twin = replace(next(b for b in bases if b.name == "qwen3-4b"), name="newer", released="2025-05")
    copies = [*fits, replace(next(f for f in fits if f.name == "qwen3-4b"), name="newer")]
    order = rank("chat", [*bases, twin], copies)
    assert order.index("newer") == order.index("qwen3-4b") - 1


def test_the_answer_is_text_and_json(slimtune, slimtune_json):
    args = ("models", "--family", "smollm2", "--fits", "rtx 3090", "--purpose", "chat")
    numbered = [line.split() for line in slimtune(*args, columns=200).stdout.splitlines() if line[:1].isdigit()]
    assert [words[1] for words in numbered[:3]] == ["smollm2-1.7b", "smollm2-360m", "smollm2-135m"]
    assert [m["name"] for m in slimtune_json(*args)["models"]] == ["smollm2-1.7b", "smollm2-360m", "smollm2-135m"]


@pytest.mark.parametrize("args", [("--purpose", "chat"), ("--fits", "rtx 3090", "--purpose", "chatt")])
def test_a_wrong_purpose_is_refused(slimtune, args):
    assert slimtune("models", *args).exit_code == 2
