"""Machines beside each other: prices, ranks, break-even."""

import pytest
from hand_plan import hand_plan

from slimtune.core.models.base_config import load_base_config
from slimtune.hardware.machine_choice import (
    count_runs_to_break_even,
    make_machine_offer,
    rank_fitting_machines_by_price,
)
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.serving_memory import estimate_serving_memory


def machine(name, speed=1000.0, **fields):
    card = require_gpu_by_name(name)
    return make_machine_offer(card, hand_plan("lora", card, tokens_per_second=Interval(speed, speed), **fields),
                            trained_tokens=3_600_000, dollars_per_kwh=0.5)  # fmt: skip


def test_the_cheapest_that_fits_and_is_in_time_is_first():
    some = [machine("rtx-3090"), machine("rtx-4090"), machine("rtx-4080", verdict="tight"), machine("rtx-5090", 50)]
    assert [m.gpu for m in rank_fitting_machines_by_price(some)] == ["rtx-3090", "rtx-4090", "rtx-5090"]
    assert [m.gpu for m in rank_fitting_machines_by_price(some, max_hours=2, budget=1400)] == ["rtx-3090"]
    by_rent = [m.gpu for m in rank_fitting_machines_by_price(some, by_rent=True)]
    assert by_rent == ["rtx-3090", "rtx-4090", "rtx-5090"]
    assert rank_fitting_machines_by_price(some, budget=100) == []


def test_break_even():
    one_hour = machine("rtx-3090")
    assert (*one_hour.cost.power,) == pytest.approx((0.105, 0.175))
    price, rent = Interval(1300, 1300), Interval(1.105, 1.175)
    even = count_runs_to_break_even(price, rent, one_hour.cost.power)
    assert tuple(even.to_interval()) == pytest.approx((1215, 1398), abs=1)
    assert count_runs_to_break_even(Interval(1300, 1300), Interval(0.1, 0.1), one_hour.cost.power) is None


def test_serving_only_where_an_8b_fits():
    assert make_machine_offer(require_gpu_by_name("m1-8gb")).serving is None
    assert 80 < machine("rtx-3090").serving.decode.low < machine("rtx-3090").serving.decode.high < 170


def test_speed_of_an_8b_is_that_of_a_plan():
    card, config = require_gpu_by_name("rtx-3090"), load_base_config("llama-3.1-8b").config
    shown = make_machine_offer(card).serving
    planned = estimate_serving_memory(config, engine="llama.cpp", gpu=card, context=4096)
    assert (*shown.decode,) == pytest.approx((*planned.decode_tokens_per_second,), rel=0.03)
    assert (*shown.prefill,) == pytest.approx((*planned.prefill_tokens_per_second,), rel=0.03)
