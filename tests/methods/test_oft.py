"""OFT: orthogonality, COFT's limit, PEFT's block sizes."""

import pytest
import torch
from peft.tuners.oft.layer import OFTLayer

from slimtune import OFTConfig
from slimtune.adapters.base import BaseForward, Site
from slimtune.errors import ConfigError
from slimtune.methods.oft import nearest_divisor


def site(size=(24, 20), dtype=torch.float64):
    return Site("layer", "linear", *size, torch.device("cpu"), dtype)


def rotate(delta, x):
    return delta.forward_with_base(BaseForward(torch.nn.Identity(), lambda x: x), x)


def test_block_sizes_equal_pefts():
    for size in range(1, 130):
        for near in range(1, 140):
            assert nearest_divisor(size, near) == OFTLayer.adjust_oft_parameters(None, size, near), (size, near)


@pytest.mark.parametrize(
    ("settings", "bound"), [({"use_cayley_neumann": False}, 1e-13), ({"num_cayley_neumann_terms": 40}, 1e-9)]
)
def test_rotation_keeps_lengths(settings, bound):
    torch.manual_seed(0)
    delta = OFTConfig(oft_block_size=6, init_weights=False, **settings).build(site())
    x = torch.randn(9, 24, dtype=torch.float64)
    assert (rotate(delta, x) - x).abs().max() > 0.1
    assert (rotate(delta, x).norm(dim=1) - x.norm(dim=1)).abs().max() < bound


def test_bf16_rounds_the_change_only():
    """Rounding R itself would stretch its inputs: 0.9982 on its diagonal is 1 in bf16."""
    torch.manual_seed(0)
    delta = OFTConfig(oft_block_size=2).build(site(dtype=torch.float32))
    torch.nn.init.constant_(delta.oft_R.weight, 0.03)
    x = torch.randn(4000, 24).bfloat16()
    exact, found = rotate(delta, x.float()), rotate(delta, x).float()
    assert ((exact * found).sum() / exact.square().sum()).item() == pytest.approx(1, abs=2e-4)


def test_coft_limits_the_rotation():
    delta = OFTConfig(r=4, oft_block_size=0, coft=True, eps=0.1, init_weights=False).build(site()).eval()
    x, before = torch.randn(9, 24, dtype=torch.float64), delta.oft_R.weight.detach().clone()
    y = rotate(delta, x)
    assert torch.equal(delta.oft_R.weight, before)
    assert torch.equal(rotate(delta.train(), x), y)
    assert (delta.oft_R.weight.norm(dim=1) * 2**0.5 - 0.1 / 2).abs().max() < 1e-12


def test_dropped_blocks_are_the_identity():
    delta = OFTConfig(oft_block_size=4, module_dropout=0.5, init_weights=False).build(site()).train()
    x = torch.randn(9, 24, dtype=torch.float64)
    same = (rotate(delta, x) == x).view(9, 6, 4).all(2).all(0)
    assert same.sum() == 3


def test_a_block_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"layer has 25 inputs(?s:.*)hint: oft_block_size=5, or leave the layer out"):
        OFTConfig(oft_block_size=2).build(site((25, 20)))
    with pytest.raises(ConfigError, match="hint: r=0, oft_block_size=2"):
        OFTConfig(r=24, oft_block_size=0).build(site())


@pytest.mark.parametrize("settings", [{"oft_block_size": 5}, {"r": 5, "oft_block_size": 0}])
def test_another_block_size_warns(settings):
    with pytest.warns(UserWarning, match="layer has 24 inputs: its blocks have size [46]"):
        OFTConfig(**settings).build(site())
