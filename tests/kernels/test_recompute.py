"""Tiles of tokens, gated MLPs and norms: memory, bits, and parameters outside the module.

`test_memory_savings.py` has the gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from reference import saved_for_backward, storage_bytes
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slimtune.errors import ModelError
from slimtune.kernels.recompute import gated_linear, rms_norm, run_tiled
from slimtune.planning.memory_tracker import MemoryTracker

NORM_SHAPE = (2, 33, 64)


def test_memory_of_one_tile():
    mlp = nn.Sequential(nn.Linear(8, 400), nn.GELU(), nn.Linear(400, 8))
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
    assert all(torch.equal(a, b) for a, b in zip(backward(gated_linear), separate, strict=True))


def test_gated_linear_keeps_two_tensors():
    linear = nn.Linear(64, 8)
    gate, up = (torch.randn(1, 100, 64, requires_grad=True) for _ in range(2))
    weights = list(linear.parameters())
    separate = saved_for_backward(lambda: linear(F.silu(gate) * up), weights)
    ours = saved_for_backward(lambda: gated_linear(F.silu, gate, up, linear), weights)
    assert storage_bytes(separate) == 4 * 4 * 6400
    assert storage_bytes(ours) == 2 * 4 * 6400


@pytest.fixture
def norm():
    module = LlamaRMSNorm(NORM_SHAPE[-1], eps=1e-5)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight, 1, 0.3)
    return module.requires_grad_(False)


def inputs(dtype):
    torch.manual_seed(1)
    return (3 * torch.randn(NORM_SHAPE)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_a_norm_are_those_of_its_module(norm, dtype):
    norm.to(dtype)
    assert torch.equal(rms_norm(inputs(dtype), norm.weight, 1e-5), norm(inputs(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_norm(norm, dtype):
    """As close to those of float64 as those of the module."""
    x, own, exact = inputs(dtype), inputs(dtype), inputs(dtype).detach().double().requires_grad_()
    norm.to(dtype)
    slope = torch.randn(NORM_SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    rms_norm(x, norm.weight, 1e-5).backward(slope)
    norm(own).backward(slope)
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (norm.weight.double() * exact * inverse).backward(slope.double())
    error, own_error = ((g - exact.grad).norm() / exact.grad.norm() for g in (x.grad, own.grad))
    assert error < 1.02 * own_error < 0.01


def test_norm_keeps_only_its_input(norm):
    x, weight = inputs(torch.bfloat16), norm.to(torch.bfloat16).weight
    kept = saved_for_backward(lambda: rms_norm(x, weight, 1e-5), [weight])
    assert storage_bytes(kept) == 2 * x.numel() + 4 * NORM_SHAPE[0] * NORM_SHAPE[1]
