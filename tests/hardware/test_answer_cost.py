"""What a million tokens of answers cost."""

import pytest

from slimtune.extras.known_models import list_alias_names
from slimtune.hardware.answer_cost import list_answer_prices, list_machine_answer_costs
from slimtune.hardware.run_cost import read_price_rows
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval


def test_every_price_of_answers_has_an_address_a_date_and_a_known_base():
    for row in read_price_rows("answer_prices.csv"):
        assert row["base"] in list_alias_names()
        assert row["source"].startswith("https://"), row
        assert len(row["date"].split("-")) == 3, row
        assert float(row["dollars_read"]) > 0, row
        assert float(row["dollars_written"]) > 0, row


def test_cheapest_writer_comes_first():
    written = [p.dollars_written for p in list_answer_prices("llama-3.1-8b")]
    assert len(written) > 3
    assert written == sorted(written)


def test_electricity_of_a_million_tokens_is_time_times_power():
    gpu = require_gpu_by_name("rtx-3090")  # 350 W
    (own, *rented) = list_machine_answer_costs(gpu, Interval(100, 100), Interval(1000, 1000), 0.2, None)
    hours = 1e6 / 100 / 3600
    assert own.written.high == pytest.approx(hours * 0.35 * 0.2)
    assert own.read.high == pytest.approx(hours / 10 * 0.35 * 0.2)
    assert rented


def test_cost_of_answers_names_machine_and_services(slimtune_json):
    found = slimtune_json("cost", "llama-3.1-8b", "--gpu", "rtx-3090", "--serve")
    assert found["machine"][0]["name"].startswith("electricity")
    assert found["services"][0]["dollars_written"] <= found["services"][-1]["dollars_written"]
    assert found["million_tokens_to_break_even"] is None or found["million_tokens_to_break_even"]["low"] > 0
