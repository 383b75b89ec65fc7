"""LoKr: PEFT's sizes, memory, dropout."""

import pytest
import torch
from peft.tuners.lokr.layer import factorization

from slimtune import LoKrConfig
from slimtune.adapters.base import Site
from slimtune.methods.lokr import factorize


def test_sizes_equal_pefts():
    for size in [*range(1, 200), 576, 1536, 49152, 127]:
        for most in (-1, 1, 2, 3, 4, 7, 8, 16, 500):
            assert factorize(size, most) == factorization(size, most), (size, most)


@pytest.mark.parametrize(
    "settings", [{"r": 2}, {"r": 99}, {"r": 2, "decompose_both": True}, {"r": 99, "decompose_factor": 3}]
)
@pytest.mark.parametrize("size", [(48, 36), (30, 200), (200, 30)])
def test_forward_allocates_nothing_of_the_weights_size(settings, size):
    torch.manual_seed(0)
    delta = LoKrConfig(init_weights=False, **settings).build(
        Site("layer", "linear", *size, torch.device("cpu"), torch.float64)
    )
    x, made = torch.randn(2, size[0], dtype=torch.float64), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        y = delta(x, torch.zeros(2, size[1], dtype=torch.float64))
    whole = delta.merge_into(torch.zeros(size[1], size[0], dtype=torch.float64), None)[0]
    assert (y - x @ whole.t()).abs().max() < 1e-12
    assert max(made) < size[0] * size[1]


def test_rank_dropout_scale():
    site = Site("layer", "linear", 12, 20, torch.device("cpu"), torch.float64)
    x, y = torch.randn(3, 12, dtype=torch.float64), torch.zeros(3, 20, dtype=torch.float64)
    for rescale in (False, True):
        delta = LoKrConfig(r=2, init_weights=False, rank_dropout=0.5, rank_dropout_scale=rescale).build(site).train()
        torch.manual_seed(4)
        dropped = delta(x, y)
        torch.manual_seed(4)
        mask = (torch.rand(20) > 0.5).double()
        assert (dropped - delta.eval()(x, y) * (mask / mask.mean() if rescale else mask)).abs().max() < 1e-6
