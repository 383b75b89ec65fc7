"""−log p in chunks is F.cross_entropy of full logits, gradients and all; and full logits are never made."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from plain_way import Made, kept_for_backward, size
from torch import nn

from slimtune.kernels import cross_entropy
from slimtune.kernels.cross_entropy import chunked_cross_entropy, rows_at_once, target_nll


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(n, d, vocabulary, seed=0, bias=False, dtype=torch.float64):
    """`h, W, b, targets`; logits of a trained head's size."""
    h, W = normal(n, d, seed=seed).to(dtype), normal(vocabulary, d, seed=seed + 1).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    return h.requires_grad_(), W, normal(vocabulary, seed=seed + 2).to(dtype) if bias else None, targets


def plain(h, W, b, targets, scale=1.0, cap=None):
    logits = F.linear(h, W, b).double() * scale
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")


def same(got, want, wanted_of, weights):
    """Both the same, and so the gradients for an arbitrary gradient of each token's nats."""
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((nats * weights).sum(), wanted_of) for nats in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert not b.numel() or (a - b).norm() <= 1e-12 * b.norm() + 1e-15


shapes = {
    "n": st.integers(0, 9),
    "d": st.integers(1, 6),
    "vocabulary": st.integers(2, 40),
    "seed": st.integers(0, 99),
    "scale": st.sampled_from([1.0, 0.125, 3.0]),
    "cap": st.sampled_from([None, 0.5, 5.0, 30.0]),
    "bias": st.booleans(),
    "chunk": st.integers(1, 12),
}


@given(**shapes)
def test_frozen_head(n, d, vocabulary, seed, scale, cap, bias, chunk):
    h, W, b, targets = case(n, d, vocabulary, seed, bias)
    got = chunked_cross_entropy(h, W, targets, bias=b, scale=scale, cap=cap, chunk=chunk)
    same(got, plain(h, W, b, targets, scale, cap), [h], normal(n, seed=seed + 3))


@given(**shapes)
def test_head_that_trains(n, d, vocabulary, seed, scale, cap, bias, chunk):
    h, W, b, targets = case(n, d, vocabulary, seed, bias)
    train = [h, W.requires_grad_(), *([b.requires_grad_()] if bias else [])]
    with patch.object(cross_entropy, "rows_at_once", return_value=chunk):
        got = target_nll(h, lambda x: F.linear(x, W, b), targets, vocabulary, scale=scale, cap=cap)
        same(got, plain(h, W, b, targets, scale, cap), train, normal(n, seed=seed + 3))


@pytest.mark.parametrize("cap", [None, 30.0])
def test_sure_and_hopeless_tokens(cap):
    """Logits in the hundreds, where p is 0 or 1 to the last digit."""
    h, W, _, targets = case(16, 8, 50)
    h = (h.detach() * 200).requires_grad_()
    same(chunked_cross_entropy(h, W, targets, cap=cap), plain(h, W, None, targets, cap=cap), [h], normal(16, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states(dtype):
    h, W, b, targets = case(40, 64, 300, bias=True, dtype=dtype)
    h = (h.detach() / 8).requires_grad_()
    exact = h.detach().double().requires_grad_()
    want = plain(exact, W.double(), b.double(), targets, cap=30.0)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    head = nn.Linear(64, 300, dtype=dtype)
    head.weight.data, head.bias.data = W, b
    head.requires_grad_(False)
    most = 1e-6 if dtype == torch.float32 else 1e-2
    for got in (chunked_cross_entropy(h, W, targets, bias=b, cap=30.0), target_nll(h, head, targets, 300, cap=30.0)):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() / want.norm() < most
        (own,) = torch.autograd.grad(got.sum(), h)
        assert own.dtype == dtype
        assert (own.double() - slope).norm() / slope.norm() < most


# --- bytes ------------------------------------------------------------------------------------------------------------

N, D, V, CHUNK = 512, 16, 1024, 32


@pytest.fixture(params=["frozen", "trains", "frozen, capped"])
def way(request):
    h, W, _, targets = case(N, D, V, dtype=torch.float32)
    if request.param == "trains":
        W.requires_grad_()
        with patch.object(cross_entropy, "rows_at_once", return_value=CHUNK):
            yield lambda: target_nll(h, lambda x: F.linear(x, W), targets, V), [h, W, targets]
    else:
        cap = 30.0 if "capped" in request.param else None
        yield lambda: chunked_cross_entropy(h, W, targets, cap=cap, chunk=CHUNK), [h, W, targets]


def test_no_logits_survive_the_forward(way):
    run, given = way
    with Made() as made:
        nats = run()
    assert nats.requires_grad
    # A gradient as large as h, each token's nats; nothing of N × V, or of a chunk.
    assert made.lives(given) <= size(given[:1]) + 2 * size([nats])
    assert size(kept_for_backward(run, given)) <= size(given[:1])


def test_full_logits_are_never_made(way):
    run, given = way
    with Made() as made:
        run().sum().backward()
    assert made.largest <= 4 * CHUNK * V
    assert made.largest > size(given[:1])


def test_the_count_sees_full_logits():
    h, W, _, targets = case(N, D, V, dtype=torch.float32)
    with Made() as made:
        nats = F.cross_entropy(F.linear(h, W), targets, reduction="none")
    assert nats.requires_grad
    assert made.lives([h, W, targets]) >= 4 * N * V
    assert size(kept_for_backward(lambda: F.cross_entropy(F.linear(h, W), targets), [h, W])) >= 4 * N * V


def test_without_gradients():
    h, W, b, targets = case(7, 3, 20, bias=True)
    with torch.no_grad():
        for got in (
            chunked_cross_entropy(h, W, targets, bias=b),
            target_nll(h, lambda x: F.linear(x, W, b), targets, 20),
        ):
            assert got.grad_fn is None
            torch.testing.assert_close(got, plain(h, W, b, targets), rtol=1e-12, atol=1e-12)


def test_rows_at_once():
    """A chunk of logits stays small, and no head is so large that rows go one by one."""
    cpu = torch.device("cpu")
    assert 4 * rows_at_once(49_152, cpu) * 49_152 <= 64 << 20
    assert rows_at_once(10**9, cpu) == 16
