from types import SimpleNamespace

import pytest
import torch

from slimtune.core.kernels.dropout import fork_rng, get_rng_state, preserve_rng_state

CPU = torch.device("cpu")


def test_fork_rng():
    state = get_rng_state(CPU)
    first, second = torch.rand(5), torch.rand(5)
    torch.set_rng_state(state)
    torch.rand(5)
    with fork_rng(state, CPU):
        assert torch.equal(torch.rand(5), first)
    assert torch.equal(torch.rand(5), second)


def test_preserve_rng_state():
    state = get_rng_state(CPU)
    with preserve_rng_state(CPU):
        torch.rand(5)
    assert torch.equal(get_rng_state(CPU), state)


@pytest.mark.parametrize("name", ["cuda:1", "mps:0", "xpu:0"])
def test_each_device_has_its_own_generator(name, monkeypatch):
    device, calls = torch.device(name), []
    generator = SimpleNamespace(
        get_rng_state=lambda where: calls.append(("get", where)) or "now",
        set_rng_state=lambda state, where: calls.append((state, where)),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda where: generator)
    with fork_rng("then", device):
        assert calls == [("get", device), ("then", device)]
    assert calls[2:] == [("now", device)]
