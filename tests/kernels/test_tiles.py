"""Maps of tokens in tiles: what is held, and what they may not hide. That gradients are the same:
test_memory_savings."""

import pytest
import torch

from slimtune.errors import ModelError
from slimtune.kernels.tiled_mlp import run_tiled
from slimtune.planning.memory_tracker import MemoryTracker


def test_one_layer_s_tile_is_all_that_is_held():
    """In tiles of 64, a feed-forward of 4096 tokens keeps x, and at its highest point little beside x and y."""
    wide_map = torch.nn.Sequential(torch.nn.Linear(8, 400), torch.nn.GELU(), torch.nn.Linear(400, 8))
    x = torch.randn(1, 4096, 8, requires_grad=True)
    peaks = []
    for tokens in (4096, 64):
        with MemoryTracker() as tracker:
            run_tiled(wide_map, x, tokens, list(wide_map.parameters())).sum().backward()
        peaks.append(tracker.peak)
    assert peaks[1] < peaks[0] / 15


def test_a_parameter_that_a_tiled_map_hides_is_an_error():
    hidden = torch.nn.Parameter(torch.ones(8))
    x = torch.randn(1, 9, 8, requires_grad=True)
    with pytest.raises(ModelError, match="does not belong to its module"):
        run_tiled(lambda part: part * hidden, x, 4, []).sum().backward()
