"""Prices: each has an address and a date, and those of now decide."""

import datetime
import re

import pytest
from hand_plan import hand_plan

from slimtune.hardware.machine_choice import (
    list_purchase_prices,
    list_tuning_service_prices,
    make_machine_offer,
    rank_fitting_machines_by_price,
)
from slimtune.hardware.run_cost import list_rent_prices
from slimtune.planning.gpu_specs import MAX_AGE, require_gpu_by_name
from slimtune.planning.interval import Interval

ADDRESS = re.compile(r"https://[\w.-]+\.[a-z]+/\S+")
NOW = [p for p in list_purchase_prices() if p.condition != "launch"]


@pytest.mark.parametrize(
    "price",
    [*list_purchase_prices(), *list_rent_prices(), *list_tuning_service_prices()],
    ids=lambda p: getattr(p, "gpu", "service"),
)
def test_price_has_an_address_and_a_date(price):
    assert ADDRESS.search(price.source)
    oldest = datetime.date(2016, 1, 1) if getattr(price, "condition", "") == "launch" else datetime.date(2026, 2, 1)
    assert oldest <= datetime.date.fromisoformat(price.date) <= datetime.date.today()


def test_prices_name_machines_of_the_table():
    for price in [*list_purchase_prices(), *list_rent_prices()]:
        assert require_gpu_by_name(price.gpu).name == price.gpu
    for purchase in list_purchase_prices():
        assert purchase.condition in ("street", "list", "used", "launch")
        assert 100 < purchase.dollars < 30_000


def test_sixty_machines_have_a_price_of_now():
    assert len({p.gpu for p in NOW}) >= 60
    assert len({p.gpu for p in list_rent_prices()}) >= 60


def machine(name, speed=1000.0):
    gpu = require_gpu_by_name(name)
    plan = hand_plan("lora", gpu, tokens_per_second=Interval(speed, speed))
    return make_machine_offer(gpu, plan, trained_tokens=3_600_000)


def test_price_of_now_decides_and_a_launch_price_comes_last():
    assert machine("rtx-3090").price.high < 1499
    assert machine("rtx-5090").price.low > 1999
    cheap_at_launch, now = machine("rtx-3050-8gb"), machine("rtx-5090")
    assert cheap_at_launch.has_only_launch_price
    assert rank_fitting_machines_by_price([cheap_at_launch, now]) == [now, cheap_at_launch]


def test_kind_of_a_price_shows_and_so_does_the_month_of_an_old_one(monkeypatch):
    assert re.fullmatch(r"launch \d{4}-\d\d", machine("rtx-3050-8gb").describe_price_kind())
    monkeypatch.setattr("slimtune.planning.gpu_specs.MAX_AGE", 10 * MAX_AGE)
    assert machine("rtx-5070").describe_price_kind() == "used–street"
    assert machine("m1-ultra-64gb").describe_price_kind() == "-"


def test_price_of_a_macbook_is_not_that_of_a_mac_mini():
    gpu = require_gpu_by_name("m4-16gb")
    macbook = make_machine_offer(gpu, only_macbook=True)
    assert {p.machine.split()[0] for p in macbook.purchases} == {"MacBook"}
    assert macbook.price != make_machine_offer(gpu).price
