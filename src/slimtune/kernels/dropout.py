"""What is left out by chance while training: single inputs, or whole outputs of an update; and drawing it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def dropout(probability: float) -> nn.Module:
    """Return a dropout of inputs; where the probability is 0 a module that does nothing."""
    return nn.Dropout(probability) if probability else nn.Identity()


def active_dropout_p(module: nn.Module) -> float:
    """Return the probability with which a module made by `dropout` leaves out an input at this moment."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def output_dropout_mask(outputs: int, probability: float, *, rescale: bool) -> Tensor:
    """Draw which outputs of an update stay, as 0 and 1 `(outputs)`; with `rescale` their mean is 1."""
    # On the CPU, as PEFT draws them.
    drop = (torch.rand(outputs) > probability).float()
    return drop / drop.mean().clamp_min(1 / outputs) if rescale else drop


def get_rng_state(device: torch.device) -> Tensor:
    """Return where a device's random numbers stand; every kind of device draws its own."""
    return _own(device).get_rng_state(device) if _own(device) else torch.get_rng_state()


def get_rng_states(device: torch.device) -> list[tuple[Tensor, torch.device]]:
    """Return where the random numbers of the CPU and of a device stand, for `put_back`."""
    return [(get_rng_state(d), d) for d in {torch.device("cpu"), device}]


def set_rng_states(states: list[tuple[Tensor, torch.device]]) -> None:
    """Put random numbers where `random_states` found them."""
    for state, device in states:
        _set_random_state(state, device)


@contextmanager
def fork_rng(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw as from `state` for the length of the `with`; after it as if nothing had been drawn."""
    now = get_rng_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Draw, on a device and on the CPU, what leaves no trace after the `with`."""
    cpu = torch.device("cpu")
    with fork_rng(get_rng_state(cpu), cpu), fork_rng(get_rng_state(device), device):
        yield


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if _own(device):
        _own(device).set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _own(device: torch.device) -> Any:
    """Return the module of a device that draws by itself, None where the CPU's generator draws."""
    return torch.get_device_module(device) if device.type in ("cuda", "xpu", "mps") else None
