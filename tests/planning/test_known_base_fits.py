"""Which known bases run and train on a machine."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from slimtune.extras.known_models import list_alias_names
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.known_base_fits import find_known_base_fits, find_training_fit, load_training_needs
from slimtune.planning.known_bases import list_known_bases

SCRIPT = Path(__file__).parents[2] / "docs/internals/make_training_needs.py"


def test_every_known_base_has_its_training_needs():
    assert set(load_training_needs()) == set(list_alias_names()), f"python {SCRIPT}"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["smollm2-135m", "llama-3.1-8b", "qwen3.5-9b", "gpt-oss-20b"])
def test_shipped_training_needs_are_what_is_planned_today(base):
    planned = runpy.run_path(str(SCRIPT))["plan_needs"](base)
    shipped = {way: [need.low, need.high] for way, need in load_training_needs()[base].items()}
    assert planned == {way: pytest.approx(ends, rel=0.02) for way, ends in shipped.items()}, f"python {SCRIPT}"


def test_training_in_16_bits_comes_before_nf4():
    assert find_training_fit("llama-3.1-8b", require_gpu_by_name("rtx-3090")).weights == "bfloat16"
    small = find_training_fit("llama-3.1-8b", require_gpu_by_name("rtx-3060-12gb"))
    assert (small.weights, small.verdict) == ("nf4", "fits")
    assert find_training_fit("llama-3.1-8b", require_gpu_by_name("rtx-3050-6gb")).verdict == "does not fit"


def test_training_is_not_known_where_it_was_not_planned():
    gpu = require_gpu_by_name("rtx-3090")
    assert find_training_fit("no-base", gpu) is None
    assert find_training_fit("llama-3.1-8b", replace(gpu, auto_bf16=False)) is None


def test_bases_come_by_size_with_a_verdict_each():
    found = list(find_known_base_fits(list_known_bases("smollm2"), require_gpu_by_name("rtx-3090")))
    assert [f.name for f in found] == ["smollm2-1.7b", "smollm2-360m", "smollm2-135m"]
    assert all(f.serving.verdict == "fits" and f.fits for f in found)


def test_models_that_fit_are_a_table_and_json(slimtune, slimtune_json):
    args = ("models", "--family", "smollm2", "--fits", "rtx 3090")
    assert len([line for line in slimtune(*args).stdout.splitlines() if line.startswith("smollm2")]) == 3
    assert json.dumps(slimtune_json(*args)).count('"verdict"') >= 6
