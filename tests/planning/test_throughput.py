"""The roofline against published runs, and hours, energy and money computed from it."""

import datetime
from collections import Counter
from dataclasses import replace

import published_hours as published
import pytest
import torch

from slimtune.core.foundation.json_results import to_json_dict
from slimtune.errors import UsageError
from slimtune.hardware.run_cost import estimate_run_cost, list_rent_prices
from slimtune.planning.gpu_specs import make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.plan_result import TrainingWorkload
from slimtune.planning.throughput import UTILIZATION, estimate_training_speed, get_utilization

H100, BF16 = require_gpu_by_name("h100-sxm"), torch.bfloat16
OPERATIONS, MOVED = 2 * 4096**3, 6 * 4096**2
PRODUCTS = Counter({(OPERATIONS, MOVED, BF16): 10})  # of 4096 × 4096 matrices


def speed(counts, gpu=H100, **more):
    return estimate_training_speed(TrainingWorkload(counts, {}, 1000, **more), gpu)


ROWS = published.compare_points()
FITTED = {v: [r for r in ROWS if r["vendor"] == v and not r["held out"]] for v in UTILIZATION}


@pytest.mark.parametrize("vendor", UTILIZATION)
def test_range_is_where_runs_of_an_author_left_out_lie(vendor):
    assert published.judge_left_out(FITTED[vendor])[1] >= published.INSIDE
    assert tuple(UTILIZATION[vendor]) == pytest.approx(tuple(published.make_range(FITTED[vendor])), abs=0.006)


def test_table_in_the_docs():
    page = published.PAGE.read_text(encoding="utf-8")
    assert page == published.replace_figures(page, published.make_figures(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("index", [3, 40, 70])
def test_kept_rooflines(index):
    row = ROWS[index]
    assert published.trace_roofline(row) == pytest.approx(row["tokens_per_second"] / row["share"], rel=0.01)


def test_every_kind_of_training_is_on_both_sides():
    points = published.TABLE["points"]
    sides = {(published.name_kind_of_training(p), published.is_held_out(p)) for p in points}
    assert sides == {(kind, held) for kind in ("full", "LoRA", "QLoRA") for held in (False, True)}
    held = {published.name_author(p["source"]) for p in points if published.is_held_out(p)}
    assert held == {"foundation-model-stack", "ljm565", "ricable"}
    assert all(p["source"] and p["date"] for p in points[published.EARLIER_POINTS :])


def test_range_is_as_narrow_as_the_runs_are():
    """A range a third narrower loses more than one run in ten."""
    (low, high), rows = UTILIZATION["nvidia"], FITTED["nvidia"]
    middle, factor = (low * high) ** 0.5, (high / low) ** (1 / 3)
    assert sum(middle / factor <= r["share"] <= middle * factor for r in rows) < 0.9 * len(rows)


def test_range_of_a_vendor_without_runs_is_guessed():
    amd = require_gpu_by_name("mi300x")
    assert amd.vendor not in UTILIZATION
    assert get_utilization(amd).high / get_utilization(amd).low > UTILIZATION["nvidia"].high / UTILIZATION["nvidia"].low


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (PRODUCTS, 10 * OPERATIONS / 989e12),  # arithmetic
        (Counter({(0, MOVED, BF16): 10}), 10 * MOVED / 3.35e12),  # traffic
        (Counter({(0, 64, BF16): 1000}), 1000 * 8e-6),  # kernel launches
    ],
)
def test_what_bounds_an_operator(work, seconds):
    assert (*speed(work),) == pytest.approx([u * 1000 / seconds for u in get_utilization(H100)])


def test_optimizer_step_counts_once():
    optimizer_step_bytes = int(4 * 10 * OPERATIONS / 989e12 * 3.35e12)
    with_step = speed(PRODUCTS, optimizer_step_bytes=optimizer_step_bytes, micro_batches_per_step=4)
    assert with_step.high == pytest.approx(speed(PRODUCTS).high / 2, rel=1e-3)


def test_rates_of_the_gpu():
    half = Counter({(OPERATIONS, MOVED, torch.float16): 10})
    slow, fast = (speed(work, require_gpu_by_name("t4")) for work in (PRODUCTS, half))
    assert fast.high == pytest.approx(slow.high * 65 / 8.1)  # bf16, which it lacks, runs as float32
    assert speed(PRODUCTS, make_gpu_with_memory("24GiB")) is None


def test_hours_energy_and_money():
    cost = estimate_run_cost(Interval(1000, 2000), 7_200_000, H100, dollars_per_hour=3.0, dollars_per_kwh=0.25)
    assert (cost.hours, cost.rent, cost.prices) == (Interval(1, 2), Interval(3, 6), ())
    assert tuple(cost.kwh) == pytest.approx((0.42, 1.4))
    assert tuple(cost.power) == pytest.approx((0.105, 0.35))
    assert to_json_dict(cost)["rent"] == {"low": 3, "high": 6}


def test_rent_from_the_table():
    cost = estimate_run_cost(Interval(1000, 2000), 7_200_000, H100)
    found = [p.dollars_per_hour for p in list_rent_prices("h100-sxm")]
    assert (cost.rent, cost.power) == (Interval(min(found), 2 * max(found)), None)
    assert all(p["date"] and p["source"] for p in to_json_dict(cost)["prices"])


def test_unknown_price_and_power():
    cost = estimate_run_cost(
        Interval(1000, 2000), 7_200_000, replace(H100, name="another", watts=None), dollars_per_kwh=0.25
    )
    assert (cost.rent, cost.kwh, cost.power) == (None, None, None)


def test_table_of_prices():
    assert len({p.gpu for p in list_rent_prices()}) >= 15
    for price in list_rent_prices():
        assert require_gpu_by_name(price.gpu).name == price.gpu
        assert 0.05 < price.dollars_per_hour < 20
        assert price.provider
        assert price.source
        datetime.date.fromisoformat(price.date)
    assert all("spot" in p.provider for p in list_rent_prices() if "deploybase" in p.source)


def test_price_must_be_above_zero():
    with pytest.raises(UsageError, match="dollars_per_hour"):
        estimate_run_cost(Interval(1, 2), 10, H100, dollars_per_hour=0)
