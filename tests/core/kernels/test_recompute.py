"""Tiles of tokens and gated MLPs: memory, and parameters outside the module.

`test_memory_savings.py` has the gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from reference import saved_for_backward, storage_bytes
from torch import nn

from slimtune.core.kernels.recompute import gated_linear_recomputing_product, run_in_token_tiles
from slimtune.errors import ModelError
from slimtune.planning.memory_tracker import MemoryTracker


def test_memory_of_one_tile():
    mlp = nn.Sequential(nn.Linear(8, 400), nn.GELU(), nn.Linear(400, 8))
    x = torch.randn(1, 4096, 8, requires_grad=True)
    peaks = []
    for tokens in (4096, 64):
        with MemoryTracker() as tracker:
            run_in_token_tiles(mlp, x, tokens, list(mlp.parameters())).sum().backward()
        peaks.append(tracker.peak)
    assert peaks[1] < peaks[0] / 15


def test_unknown_parameter():
    hidden = torch.nn.Parameter(torch.ones(8))
    x = torch.randn(1, 9, 8, requires_grad=True)
    with pytest.raises(ModelError, match="module"):
        run_in_token_tiles(lambda part: part * hidden, x, 4, []).sum().backward()


@pytest.mark.parametrize(
    "linear", [nn.Linear(64, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 8)), nn.Tanh()], ids=str
)
def test_gated_linear_has_the_bits_of_separate_operations(linear):
    def backward(run):
        torch.manual_seed(0)
        gate, up = (torch.randn(2, 5, 64, requires_grad=True) for _ in range(2))
        out = run(F.silu, gate, up, linear)
        out.square().sum().backward()
        return out, gate.grad, up.grad

    separate = backward(lambda activation, gate, up, linear: linear(activation(gate) * up))
    assert all(torch.equal(a, b) for a, b in zip(backward(gated_linear_recomputing_product), separate, strict=True))


def test_gated_linear_keeps_two_tensors():
    linear = nn.Linear(64, 8)
    gate, up = (torch.randn(1, 100, 64, requires_grad=True) for _ in range(2))
    weights = list(linear.parameters())
    separate = saved_for_backward(lambda: linear(F.silu(gate) * up), weights)
    ours = saved_for_backward(lambda: gated_linear_recomputing_product(F.silu, gate, up, linear), weights)
    assert storage_bytes(separate) == 4 * 4 * 6400
    assert storage_bytes(ours) == 2 * 4 * 6400
