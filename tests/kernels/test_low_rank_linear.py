"""A frozen map with a low-rank update as one step of autograd: its numbers, and the bytes it keeps."""

from unittest.mock import patch

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from plain_way import kept_for_backward, size
from torch import nn

import slimtune
from slimtune.kernels.lora_linear import low_rank_linear, plus_low_rank

NAMES = ("x", "weight", "bias", "A", "B")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts(lead=(2, 5), n=6, m=4, r=3, bias=True, dtype=torch.float64):
    """`x, W, b, A, B`, of which x, A and B want a gradient."""
    made = [normal(*lead, n), normal(m, n, seed=1), normal(m, seed=2), normal(r, n, seed=3), normal(m, r, seed=4)]
    x, W, b, A, B = (t.to(dtype) for t in made)
    return x.requires_grad_(), W, b if bias else None, A.requires_grad_(), B.requires_grad_()


def plain(x, W, b, A, B, scale, drop=0.0):
    return F.linear(x, W, b) + scale * F.linear(F.linear(F.dropout(x, drop), A), B)


def by_sum(x, W, b, A, B, scale, drop=0.0):
    return plus_low_rank(F.linear(x, W, b), x, A, B, scale, drop)


def answers(function, given, *how, seed=7, dtype=None):
    """The output and the gradient of each part, for one arbitrary gradient of the output."""
    given = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    torch.manual_seed(seed)
    y = function(*given, *how)
    y.backward(normal(*y.shape, seed=8).to(y.dtype))
    return {"y": y.detach()} | {n: t.grad for n, t in zip(NAMES, given, strict=True) if t is not None}


def same(got, want, rtol=1e-12, atol=1e-13):
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --- numbers ----------------------------------------------------------------------------------------------------------

ways = pytest.mark.parametrize("way", [low_rank_linear, by_sum], ids=["map", "sum"])


@ways
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    r=st.integers(0, 4),
    bias=st.booleans(),
    scale=st.floats(0.01, 8),
    drop=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
)
def test_any_shape(way, lead, n, m, r, bias, scale, drop):
    given = parts(lead, n, m, r, bias)
    same(answers(way, given, scale, drop), answers(plain, given, scale, drop))


@ways
@given(wants=st.lists(st.booleans(), min_size=5, max_size=5), drop=st.sampled_from([0.0, 0.3]))
def test_whatever_wants_a_gradient(way, wants, drop):
    """Above all x that wants none, a bias that does, an A or B that is fixed."""
    wants[1] = False  # the weight is frozen
    if not any(wants):
        return
    given = [t.detach().requires_grad_(w) for t, w in zip(parts(), wants, strict=True)]
    same(answers(way, given, 0.7, drop), answers(plain, given, 0.7, drop))


@ways
def test_views(way):
    """A Conv1D's weight, an x and a gradient that do not lie in order."""
    _, W, b, A, B = parts()
    given = [normal(5, 2, 6).transpose(0, 1).requires_grad_(), W.t().contiguous().t(), b, A, B]
    assert not given[0].is_contiguous()
    assert not given[1].is_contiguous()

    def turned(*a):
        return way(*a).transpose(0, 1)

    same(answers(turned, given, 0.7), answers(lambda *a: plain(*a).transpose(0, 1), given, 0.7))
    # A sum's gradient is one number, spread.
    got, want = (torch.autograd.grad(f(*given, 0.7).sum(), given[3])[0] for f in (way, plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_what_was_drawn_is_drawn_again_and_nothing_else():
    given = parts((40,), n=50)
    torch.manual_seed(3)
    y = low_rank_linear(*given, 0.5, 0.4)
    torch.rand(9)  # somebody else draws before the backward pass
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    want = torch.autograd.grad(plain(*given, 0.5, 0.4).sum(), given[3])[0]
    torch.testing.assert_close(given[3].grad, want, rtol=1e-12, atol=1e-13)
    torch.manual_seed(3)
    torch.testing.assert_close(y, plain(*given, 0.5, 0.4), rtol=1e-12, atol=1e-13)


def half(given, adapter=torch.float32):
    x, W, b, A, B = given
    return [*(t.detach().bfloat16() for t in (x, W, b)), *(t.detach().to(adapter) for t in (A, B))]


@ways
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_masters_in_fp32(way, adapter):
    x, W, b, A, B = half(parts((64,), n=48, m=40, r=8), adapter)
    given = [x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()]
    got = answers(way, given, 0.5)
    assert {k: got[k].dtype for k in "yxAB"} == dict(zip("yxAB", [x.dtype, x.dtype, adapter, adapter], strict=True))
    exact = answers(plain, [t.double() if t is not None else t for t in given], 0.5)
    for name in "yxAB":
        off = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert off < 0.01, name


def test_autocast_falls_back_and_is_right():
    given = [t.detach().float().requires_grad_(t.requires_grad) for t in parts((64,), n=48, m=40, r=8)]
    with torch.autocast("cpu", torch.bfloat16):
        for way in (low_rank_linear, by_sum):
            y = way(*given, 0.5)
            assert "LowRank" not in y.grad_fn.name()
            assert y.dtype == torch.bfloat16
            got = answers(way, given, 0.5)
            for name, want in answers(plain, given, 0.5).items():
                if want is not None:
                    assert got[name].dtype == want.dtype
                    assert (got[name].double() - want.double()).norm() / want.double().norm() < 0.02, name


@ways
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_compiler_sees_plain_operators(way, drop):
    given = parts()
    with patch("torch.compiler.is_compiling", return_value=True):
        assert "LowRank" not in way(*given, 0.7).grad_fn.name()
        got = answers(way, given, 0.7, drop)
    same(got, answers(plain, given, 0.7, drop))


def test_a_second_derivative_is_refused():
    x, *rest = parts()
    (gx,) = torch.autograd.grad(low_rank_linear(x, *rest, 0.7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


# --- bytes ------------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """SmolLM2's q, k and v: 9 heads of 64, of which k and v have 3."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(576, n, bias=False) for n in (576, 192, 192))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def times_x(made, drop):
    """The bytes kept for backward, over those of a bf16 x of a pack's 1024 tokens."""
    torch.manual_seed(0)
    config = made.LoraConfig(r=16, lora_dropout=drop, target_modules=["q_proj", "k_proj", "v_proj"])
    model = made.get_peft_model(Projections().bfloat16(), config).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(1, 1024, 576).bfloat16().requires_grad_()
    kept = kept_for_backward(lambda: model(x), list(model.parameters()))
    return size(kept) / size([x])


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_bytes_kept_by_q_k_v(drop, capsys):
    ours, theirs = times_x(slimtune, drop), times_x(peft, drop)
    with capsys.disabled():
        print(f"\nkept for backward by q, k, v, × their bf16 x, dropout {drop}: {ours:.3f}; peft {theirs:.1f}")
    assert ours <= 1.15
    assert theirs > 5


@ways
@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_fixed_A_keeps_no_x(way, drop):
    x, W, b, A, B = parts((100,), n=80)
    A.requires_grad_(False)
    kept = kept_for_backward(lambda: way(x, W, b, A, B, 0.5, drop), [W, A, B])
    # z, and the states of random numbers
    assert [t.shape for t in kept if t.dtype != torch.uint8] == [(100, 3)]


def test_a_fixed_B_keeps_no_z():
    x, W, b, A, B = parts((100,), n=80)
    B.requires_grad_(False)
    kept = kept_for_backward(lambda: low_rank_linear(x, W, b, A, B, 0.5), [W, A, B])
    assert [t.shape for t in kept] == [x.shape]


@ways
def test_without_gradients_nothing_is_kept(way):
    given = parts()
    with torch.no_grad():
        y = way(*given, 0.7, 0.0)
    assert y.grad_fn is None
    same({"y": y}, {"y": plain(*given, 0.7).detach()})
