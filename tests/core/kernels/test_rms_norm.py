"""The norm's step against transformers' own module."""

import pytest
import torch
from reference import saved_for_backward, storage_bytes
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slimtune.core.kernels.lora_linear import low_rank_linear
from slimtune.core.kernels.rms_norm import rms_norm

SHAPE = (2, 33, 64)


@pytest.fixture
def norm():
    module = LlamaRMSNorm(SHAPE[-1], eps=1e-5)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight, 1, 0.3)
    return module.requires_grad_(False)


def inputs(dtype):
    torch.manual_seed(1)
    return (3 * torch.randn(SHAPE)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_the_same_bits(norm, dtype):
    norm.to(dtype)
    assert torch.equal(rms_norm(inputs(dtype), norm.weight, 1e-5), norm(inputs(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients(norm, dtype):
    """As close to those of float64 as those of the module."""
    x, own, exact = inputs(dtype), inputs(dtype), inputs(dtype).detach().double().requires_grad_()
    norm.to(dtype)
    slope = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    rms_norm(x, norm.weight, 1e-5).backward(slope)
    norm(own).backward(slope)
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (norm.weight.double() * exact * inverse).backward(slope.double())
    error, own_error = ((g - exact.grad).norm() / exact.grad.norm() for g in (x.grad, own.grad))
    assert error < 1.02 * own_error < 0.01


def test_only_the_input_is_kept(norm):
    x, weight = inputs(torch.bfloat16), norm.to(torch.bfloat16).weight
    kept = saved_for_backward(lambda: rms_norm(x, weight, 1e-5), [weight])
    assert storage_bytes(kept) == 2 * x.numel() + 4 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_lora_keeps_the_norm_instead_of_its_output(norm, dropout):
    norm.to(torch.bfloat16)
    x, width = inputs(torch.bfloat16), SHAPE[-1]
    W, A, B = (torch.randn(shape, dtype=torch.bfloat16) / 8 for shape in ((32, width), (4, width), (32, 4)))
    A.requires_grad_()
    B.requires_grad_()

    def two_layers(y):
        torch.manual_seed(3)
        return sum(low_rank_linear(y, W, None, A, B, 2.0, dropout).float().sin().sum() for _ in range(2))

    kept = saved_for_backward(lambda: two_layers(rms_norm(x, norm.weight, 1e-5)), [norm.weight, W, A, B])
    assert [t.numel() for t in kept].count(x.numel()) == 1  # the norm's own input
    same = rms_norm(x, norm.weight, 1e-5).view(SHAPE)  # no norm to the layers behind it
    expected, loss = torch.autograd.grad(two_layers(same), (x, A, B)), two_layers(rms_norm(x, norm.weight, 1e-5))
    for last in (False, True):  # the graph may be used again
        found = torch.autograd.grad(loss, (x, A, B), retain_graph=not last)
        assert all(map(torch.equal, found, expected))
