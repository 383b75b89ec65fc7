"""Tensors kept on the host: gone from the device meanwhile, back when they are wanted, one ahead."""

import gc
import weakref

import pytest
import torch

from slimtune.kernels import activation_offload
from slimtune.kernels.activation_offload import ActivationOffload


@pytest.fixture(autouse=True)
def everything_goes(monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


def test_what_went_to_the_host_is_not_held():
    away = ActivationOffload()
    x = torch.randn(64, 64, requires_grad=True)
    y = x * 2
    gone = weakref.ref(y.untyped_storage())
    with away.offload_first():
        z = y.sin()
    del y
    gc.collect()
    assert gone() is None
    z.sum().backward()
    assert torch.allclose(x.grad, 2 * (2 * x).cos())


def test_they_come_back_one_ahead():
    """While one is used the one before it is on its way; no more."""
    away, order = ActivationOffload(), []
    fetch = ActivationOffload._fetch

    class Watched(ActivationOffload):
        def _fetch(self, a):
            if a.fetched is None:
                order.append(a.host.shape[0])
            fetch(self, a)

    away = Watched()
    x = torch.ones(1, requires_grad=True)
    total = torch.zeros(())
    for n in (3, 4, 5):
        y = x.expand(n) * 1.0
        with away.offload_first():
            total = total + y.cos().sum()
    seen = []
    total.register_hook(lambda _: seen.append(list(order)))
    total.backward()
    assert order == [5, 4, 3]
    assert x.grad is not None


def test_a_forward_that_failed_leaves_nothing_to_fetch():
    away = ActivationOffload()
    x = torch.randn(8, 8, requires_grad=True)
    with away.offload_first():
        lost = (x * 2).sin()
    del lost
    with away.offload_first():
        y = (x * 3).sin()
    y.sum().backward()
    assert torch.allclose(x.grad, 3 * (3 * x).cos())
