import gc
import weakref

import pytest
import torch

from slimtune.core.kernels import activation_offload
from slimtune.core.kernels.activation_offload import ActivationOffload


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


def test_device_memory_is_freed():
    offload = ActivationOffload()
    x = torch.randn(64, 64, requires_grad=True)
    y = x * 2
    storage = weakref.ref(y.untyped_storage())
    with offload.offload_first():
        z = y.sin()
    del y
    gc.collect()
    assert storage() is None
    z.sum().backward()
    assert torch.allclose(x.grad, 2 * (2 * x).cos())


def test_prefetch(monkeypatch):
    """While one tensor is used, only the one before it is fetched."""
    offload, x, total = ActivationOffload(), torch.ones(1, requires_grad=True), torch.zeros(())
    fetched, at_use = [], []
    fetch = ActivationOffload._fetch

    def record(self, tensor):
        if tensor.fetched is None:
            fetched.append(tensor.host.shape[0])
        fetch(self, tensor)

    monkeypatch.setattr(ActivationOffload, "_fetch", record)
    for n in (3, 4, 5):
        y = x.expand(n) * 1.0
        y.register_hook(lambda _: at_use.append(list(fetched)))
        with offload.offload_first():
            total = total + y.cos().sum()
    total.backward()
    assert at_use == [[5, 4], [5, 4, 3], [5, 4, 3]]


def test_dropped_graph():
    offload = ActivationOffload()
    x = torch.randn(8, 8, requires_grad=True)
    with offload.offload_first():
        dropped = (x * 2).sin()
    del dropped
    with offload.offload_first():
        y = (x * 3).sin()
    y.sum().backward()
    assert torch.allclose(x.grad, 3 * (3 * x).cos())
