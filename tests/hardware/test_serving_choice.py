"""`slimtune choose --serve`: machines to run a model on."""

import pytest

from slimtune.core.models.base_config import load_base_config
from slimtune.hardware.machine_choice import SCREEN_BYTES
from slimtune.hardware.serving_choice import (
    find_binding_serving_limits,
    make_serving_offers,
    rank_serving_machines_by_price,
)
from slimtune.planning import serving_memory
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.serving_memory import build_served_model, estimate_serving_memory

CARDS = ("gtx-1650", "rtx-3060-12gb", "rtx-3090", "rtx-4090", "m4-max-64gb", "h100-sxm")


@pytest.fixture(scope="module")
def offers():
    config = load_base_config("llama-3.1-8b").config
    return list(make_serving_offers(config, map(require_gpu_by_name, CARDS), context=8192))


def test_the_cheapest_that_fits_is_first(offers):
    ranked = rank_serving_machines_by_price(offers)
    prices = [offer.machine.price.high for offer in ranked]
    assert prices == sorted(prices)
    assert "gtx-1650" not in {offer.machine.gpu for offer in ranked}
    assert {offer.serve.context for offer in ranked} == {8192}


def test_a_speed_is_surely_reached(offers):
    fast = rank_serving_machines_by_price(offers, min_tokens_per_second=80)
    assert fast
    assert all(offer.serve.decode_tokens_per_second.low >= 80 for offer in fast)


def test_a_card_without_room_for_the_screen_comes_last(offers):
    config, card = load_base_config("llama-3.1-8b").config, require_gpu_by_name("rtx-3070")
    (crowded,) = make_serving_offers(config, [card], context=10000)
    assert crowded.serve.verdict == "fits"
    assert crowded.free_bytes < SCREEN_BYTES
    assert rank_serving_machines_by_price([crowded, *offers])[-1] is crowded


def test_many_gpus_share_the_model_without_weights(monkeypatch):
    built = []

    def build(config):
        built.append(config)
        return build_served_model(config)

    monkeypatch.setattr(serving_memory, "build_served_model", build)
    shared = list(make_serving_offers(load_base_config("smollm2-135m").config, map(require_gpu_by_name, CARDS)))
    alone = estimate_serving_memory(load_base_config("smollm2-135m").config, gpu=require_gpu_by_name(CARDS[-1]))
    assert (len(built), shared[-1].serve) == (2, alone)


@pytest.mark.parametrize(
    ("cards", "limits", "binding"),
    [
        (CARDS, {}, []),
        (["gtx-1650"], {}, ["memory"]),
        (CARDS, {"budget": 5}, ["budget"]),
        (CARDS, {"tokens_per_second": 9000}, ["tokens_per_second"]),
        (CARDS, {"budget": 300, "tokens_per_second": 100}, ["budget", "tokens_per_second"]),
    ],
)
def test_the_limit_that_binds_is_named(offers, cards, limits, binding):
    some = [offer for offer in offers if offer.machine.gpu in cards]
    found = find_binding_serving_limits(
        some, budget=limits.get("budget"), min_tokens_per_second=limits.get("tokens_per_second"), by_rent=False
    )
    assert found == binding


def test_rents_are_ranked_by_the_hour(offers):
    hourly = [offer.rent_per_hour.high for offer in rank_serving_machines_by_price(offers, by_rent=True)]
    assert hourly
    assert hourly == sorted(hourly)


def test_flags_of_training_and_of_serving_do_not_mix(slimtune):
    assert slimtune("choose", "llama-3.1-8b", "--serve", "--hours", 3).exit_code == 2
    assert slimtune("choose", "llama-3.1-8b", "--context", 4096).exit_code == 2
