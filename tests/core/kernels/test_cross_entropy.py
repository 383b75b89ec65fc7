"""The loss in chunks and its gradients equal F.cross_entropy's, and full logits are never made."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import AllocationRecorder, normal, saved_for_backward, storage_bytes
from torch import nn

from slimtune.core.kernels import cross_entropy
from slimtune.core.kernels.cross_entropy import chunked_cross_entropy, compute_target_nll, count_rows_per_logit_chunk


def make_inputs(n, d, vocabulary, seed=0, bias=False, dtype=torch.float64):
    """`h, W, b, targets`, with logits as large as those of a trained head."""
    h, W = normal(n, d, seed=seed).to(dtype), normal(vocabulary, d, seed=seed + 1).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    return h.requires_grad_(), W, normal(vocabulary, seed=seed + 2).to(dtype) if bias else None, targets


def full_cross_entropy(h, W, b, targets, scale=1.0, cap=None):
    logits = F.linear(h, W, b).double() * scale
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")


def chunks_of(rows):
    return patch.object(cross_entropy, "count_rows_per_logit_chunk", return_value=rows)


def assert_equal(nll, expected, inputs, weights):
    """Compare the losses, and their gradients for arbitrary weights of the tokens."""
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad((y * weights).sum(), inputs) for y in (nll, expected))
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert not b.numel() or (a - b).norm() <= 1e-12 * b.norm() + 1e-15


@pytest.mark.parametrize("trained", [False, True])
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    vocabulary=st.integers(2, 40),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
    cap=st.sampled_from([None, 0.5, 5.0, 30.0]),
    bias=st.booleans(),
    chunk=st.integers(1, 12),
)
def test_loss_and_gradients(trained, n, d, vocabulary, seed, scale, cap, bias, chunk):
    h, W, b, targets = make_inputs(n, d, vocabulary, seed, bias)
    inputs = [h]
    with chunks_of(chunk):
        if trained:
            inputs += [W.requires_grad_(), *([b.requires_grad_()] if bias else [])]
            nll = compute_target_nll(h, lambda x: F.linear(x, W, b), targets, vocabulary, scale=scale, cap=cap)
        else:
            nll = chunked_cross_entropy(h, W, targets, bias=b, scale=scale, cap=cap)
        expected = full_cross_entropy(h, W, b, targets, scale, cap)
        assert_equal(nll, expected, inputs, normal(n, seed=seed + 3))


@pytest.mark.parametrize("cap", [None, 30.0])
def test_extreme_probabilities(cap):
    """Logits in the hundreds, where p is 0 or 1 to the last digit."""
    h, W, _, targets = make_inputs(16, 8, 50)
    h = (h.detach() * 200).requires_grad_()
    expected = full_cross_entropy(h, W, None, targets, cap=cap)
    assert_equal(chunked_cross_entropy(h, W, targets, cap=cap), expected, [h], normal(16, seed=3))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision(dtype, limit):
    h, W, b, targets = make_inputs(40, 64, 300, bias=True, dtype=dtype)
    h = (h.detach() / 8).requires_grad_()
    exact = h.detach().double().requires_grad_()
    expected = full_cross_entropy(exact, W.double(), b.double(), targets, cap=30.0)
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    head = nn.Linear(64, 300, dtype=dtype).requires_grad_(False)
    head.weight.data, head.bias.data = W, b
    for nll in (
        chunked_cross_entropy(h, W, targets, bias=b, cap=30.0),
        compute_target_nll(h, head, targets, 300, cap=30.0),
    ):
        assert nll.dtype == torch.float32
        assert (nll.double() - expected).norm() / expected.norm() < limit
        (grad,) = torch.autograd.grad(nll.sum(), h)
        assert grad.dtype == dtype
        assert (grad.double() - expected_grad).norm() / expected_grad.norm() < limit


def test_without_gradients():
    h, W, b, targets = make_inputs(7, 3, 20, bias=True)
    with torch.no_grad():
        for nll in (
            chunked_cross_entropy(h, W, targets, bias=b),
            compute_target_nll(h, lambda x: F.linear(x, W, b), targets, 20),
        ):
            assert nll.grad_fn is None
            torch.testing.assert_close(nll, full_cross_entropy(h, W, b, targets), rtol=1e-12, atol=1e-12)


# --- memory -----------------------------------------------------------------------------------------------------------

N, D, V, CHUNK = 512, 16, 1024, 32


@pytest.mark.parametrize("head", ["frozen", "frozen, capped", "trained"])
def test_memory(head):
    h, W, _, targets = make_inputs(N, D, V, dtype=torch.float32)
    W.requires_grad_(head == "trained")

    def run():
        if head == "trained":
            return compute_target_nll(h, lambda x: F.linear(x, W), targets, V)
        return chunked_cross_entropy(h, W, targets, cap=30.0 if "capped" in head else None)

    with chunks_of(CHUNK):
        with AllocationRecorder() as recorder:
            nll = run()
        # A gradient as large as h and the losses; nothing of N × V, or of a chunk.
        assert recorder.live_bytes([h, W, targets]) <= storage_bytes([h]) + 2 * storage_bytes([nll])
        assert storage_bytes(saved_for_backward(run, [h, W, targets])) <= storage_bytes([h])
        with AllocationRecorder() as recorder:
            run().sum().backward()
    assert storage_bytes([h]) < recorder.largest <= 4 * CHUNK * V


def test_memory_of_full_logits():
    """The test above would notice full logits."""
    h, W, _, targets = make_inputs(N, D, V, dtype=torch.float32)
    with AllocationRecorder() as recorder:
        nll = F.cross_entropy(F.linear(h, W), targets, reduction="none")
    assert nll.requires_grad
    assert recorder.live_bytes([h, W, targets]) >= 4 * N * V
    assert storage_bytes(saved_for_backward(lambda: F.cross_entropy(F.linear(h, W), targets), [h, W])) >= 4 * N * V


def test_rows_at_once():
    cpu = torch.device("cpu")
    assert 4 * count_rows_per_logit_chunk(49_152, cpu) * 49_152 <= 64 << 20
    assert count_rows_per_logit_chunk(10**9, cpu) == 16
