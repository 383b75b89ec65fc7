"""LoHa: its low-rank form, memory, dropout."""

import pytest
import torch

from slimtune import LoHaConfig
from slimtune.adapters.base import Site


def build(r=2, size=(24, 20), **more):
    torch.manual_seed(0)
    site = Site("layer", "linear", *size, torch.device("cpu"), torch.float64)
    return LoHaConfig(r=r, alpha=3, init_weights=False, **more).build(site)


@pytest.mark.parametrize("r", [2, 9])
def test_low_rank_factors_equal_the_product(r):
    module = build(r)
    change = module.merge_into(torch.zeros(20, 24, dtype=torch.float64), None)[0]
    module.low_rank = True
    A, B, scale = module.low_rank_factors()
    assert A.shape == (r * r, 24)
    assert (scale * B @ A - change).abs().max() < 1e-14


def test_a_large_rank_has_no_factors():
    assert build(3).low_rank_factors() is not None
    assert build(4).low_rank_factors() is None


def test_backward_does_not_save_the_weight():
    module = build(12, (200, 300))
    kept = []
    x = torch.randn(5, 200, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = module(x, torch.zeros(5, 300, dtype=torch.float64))
    y.sum().backward()
    assert max(kept) < 200 * 300 / 10
    assert module.hada_w1_a.grad.abs().max() > 0


@pytest.mark.parametrize("r", [2, 8])
def test_rank_dropout_keeps_the_mean(r):
    module = build(r, rank_dropout=0.5).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.zeros(3, 20, dtype=torch.float64)
    torch.manual_seed(4)
    dropped = module(x, y)
    torch.manual_seed(4)
    mask = (torch.rand(20) > 0.5).double()
    assert (dropped - module.eval()(x, y) * mask / mask.mean()).abs().max() < 1e-6
    assert module.train().low_rank_factors() is None


def test_module_dropout_skips_the_layer():
    module = build(module_dropout=0.5).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.ones(3, 20, dtype=torch.float64)
    torch.manual_seed(0)
    skipped = [torch.equal(module(x, y), y) for _ in range(40)]
    assert 5 < sum(skipped) < 35
