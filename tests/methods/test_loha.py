"""LoHa's two ways to run are one map; dropouts; what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch

from slimtune import LoHaConfig
from slimtune.adapters.base import Site
from slimtune.errors import ConfigError


def delta_of(r=2, size=(24, 20), **more):
    torch.manual_seed(0)
    site = Site("layer", "linear", *size, torch.device("cpu"), torch.float64)
    return LoHaConfig(r=r, alpha=3, init_weights=False, **more).build(site)


@pytest.mark.parametrize("r", [2, 9])
def test_the_factors_are_the_product(r):
    delta = delta_of(r)
    change = delta.merged(torch.zeros(20, 24, dtype=torch.float64), None)[0]
    delta.low_rank = True
    A, B, scale = delta.low_rank_factors()
    assert A.shape == (r * r, 24)
    assert (scale * B @ A - change).abs().max() < 1e-14


def test_at_a_large_rank_no_factors_are_handed_on():
    assert delta_of(3).low_rank_factors() is not None
    assert delta_of(4).low_rank_factors() is None


def test_the_weight_is_not_kept_for_the_backward_pass():
    delta = delta_of(12, (200, 300))
    kept = []
    x = torch.randn(5, 200, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = delta(x, torch.zeros(5, 300, dtype=torch.float64))
    y.sum().backward()
    assert max(kept) < 200 * 300 / 10
    assert delta.hada_w1_a.grad.abs().max() > 0


@pytest.mark.parametrize("r", [2, 8])
def test_rank_dropout_drops_outputs_and_keeps_the_mean(r):
    delta = delta_of(r, rank_dropout=0.5).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.zeros(3, 20, dtype=torch.float64)
    torch.manual_seed(4)
    dropped = delta(x, y)
    torch.manual_seed(4)
    mask = (torch.rand(20) > 0.5).double()
    assert (dropped - delta.eval()(x, y) * mask / mask.mean()).abs().max() < 1e-6
    assert delta.train().low_rank_factors() is None


def test_module_dropout_leaves_the_layer_out():
    delta = delta_of(module_dropout=0.5).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.ones(3, 20, dtype=torch.float64)
    torch.manual_seed(0)
    left_out = [torch.equal(delta(x, y), y) for _ in range(40)]
    assert 5 < sum(left_out) < 35


def test_a_dropout_of_one_is_refused():
    with pytest.raises(ConfigError, match="rank_dropout is 1"):
        LoHaConfig(rank_dropout=1)
