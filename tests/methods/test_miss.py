"""MiSS: sizes that do not fit a layer, "bat" above another adapter, memory."""

import pytest
import torch

from slimtune import LoraConfig, MissConfig
from slimtune.adapters.base import BaseForward, Site
from slimtune.errors import ConfigError


def site(size=(24, 20)):
    return Site("layer", "linear", *size, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"r": 25}, r"r is 25, at layer \(24 inputs, 20 outputs\)"),
        ({"r": 5, "init_weights": "bat"}, "r is 5, at layer"),
        ({"r": 4, "init_weights": "mini", "mini_r": 6}, r"mini_r is 6, at layer(?s:.*)hint: mini_r=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, got):
    with pytest.raises(ConfigError, match=got):
        MissConfig(**settings).build(site())


def test_factors_equal_the_merge_with_padding():
    delta = MissConfig(r=7, init_weights=False).build(site())
    A, B, scale = delta.low_rank_factors()
    assert torch.equal(scale * B @ A, delta.merge_into(torch.zeros(20, 24, dtype=torch.float64), None)[0])


def bat(size=(40, 80)):
    torch.manual_seed(0)
    module = torch.nn.Linear(*size, bias=False, dtype=torch.float64).requires_grad_(False)
    delta = MissConfig(r=4, init_weights="bat").build(site(size))
    torch.nn.init.normal_(delta.miss_block)
    return module, delta, torch.randn(2, size[0], dtype=torch.float64)


def test_bat_saves_no_weight_of_its_own():
    module, delta, x = bat()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = delta.forward_with_base(BaseForward(module, module.forward), x)
    large = [t for t in kept if t.numel() >= module.weight.numel()]
    assert all(t.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr() for t in large)
    y.sum().backward()
    assert delta.miss_block.grad.abs().max() > 0


def test_bat_passes_gradients_to_the_adapter_below():
    """It reads the weight as the adapter below changed it."""
    module, delta, x = bat()
    below = LoraConfig(r=2, init_lora_weights=False).build(site((40, 80)))
    one = BaseForward(module, module.forward)
    y = delta.forward_with_base(BaseForward(module, lambda x: below.forward_with_base(one, x), [below]), x)
    whole = delta.merge_into(below.merge_into(module.weight, None)[0], None)[0]
    parameters = [*below.parameters(), *delta.parameters()]
    found, expected = (torch.autograd.grad(out.square().sum(), parameters) for out in (y, x @ whole.t()))
    assert all((f - e).abs().max() < 1e-9 * e.abs().max() for f, e in zip(found, expected, strict=True))
