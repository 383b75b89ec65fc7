"""Dropout of inputs or of an update's outputs, and random states to draw the same numbers again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def make_dropout(probability: float) -> nn.Module:
    """Return a dropout module; for probability 0 an identity."""
    return nn.Dropout(probability) if probability else nn.Identity()


def get_active_dropout_probability(module: nn.Module) -> float:
    """Return the probability with which a module made by `make_dropout` drops an input in its current mode."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def draw_output_dropout_mask(num_outputs: int, drop_probability: float, *, rescale_to_mean_one: bool) -> Tensor:
    """Draw which outputs of an update are kept, 0 or 1 `(num_outputs)`; with `rescale_to_mean_one` their mean is 1."""
    # On the CPU, as in PEFT.
    mask = (torch.rand(num_outputs) > drop_probability).float()
    return mask / mask.mean().clamp_min(1 / num_outputs) if rescale_to_mean_one else mask


def get_rng_state(device: torch.device) -> Tensor:
    """Return the random state of a device."""
    generator = _get_device_module(device)
    return generator.get_rng_state(device) if generator else torch.get_rng_state()


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restore a random state from `get_rng_state`."""
    generator = _get_device_module(device)
    if generator:
        generator.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def get_rng_states(device: torch.device) -> list[tuple[Tensor, torch.device]]:
    """Return the random states of the CPU and of a device, for `set_rng_states`."""
    return [(get_rng_state(d), d) for d in {torch.device("cpu"), device}]


def set_rng_states(states: list[tuple[Tensor, torch.device]]) -> None:
    """Restore random states from `get_rng_states`."""
    for state, device in states:
        set_rng_state(state, device)


@contextmanager
def fork_rng(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw from random state `state` inside the `with`; restore the current state after it."""
    current = get_rng_state(device)
    set_rng_state(state, device)
    try:
        yield
    finally:
        set_rng_state(current, device)


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of a device and of the CPU after the `with`."""
    states = get_rng_states(device)
    try:
        yield
    finally:
        set_rng_states(states)


def _get_device_module(device: torch.device) -> Any:
    """Return `torch.cuda` and the like, None for devices that use the CPU's random numbers."""
    return torch.get_device_module(device) if device.type in ("cuda", "xpu", "mps") else None
