"""Tiles of tokens: memory, and parameters outside the module (test_memory_savings has the gradients)."""

import pytest
import torch

from slimtune.errors import ModelError
from slimtune.kernels.recompute import run_tiled
from slimtune.planning.memory_tracker import MemoryTracker


def test_memory_of_one_tile():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 400), torch.nn.GELU(), torch.nn.Linear(400, 8))
    x = torch.randn(1, 4096, 8, requires_grad=True)
    peaks = []
    for tokens in (4096, 64):
        with MemoryTracker() as tracker:
            run_tiled(mlp, x, tokens, list(mlp.parameters())).sum().backward()
        peaks.append(tracker.peak)
    assert peaks[1] < peaks[0] / 15


def test_unknown_parameter():
    hidden = torch.nn.Parameter(torch.ones(8))
    x = torch.randn(1, 9, 8, requires_grad=True)
    with pytest.raises(ModelError, match="does not belong to its module"):
        run_tiled(lambda part: part * hidden, x, 4, []).sum().backward()
