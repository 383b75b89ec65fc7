"""A frozen linear layer with a low-rank update as one autograd step: its values, and the memory it keeps."""

from unittest.mock import patch

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import normal, saved_for_backward, storage_bytes
from torch import nn

import slimtune
from slimtune.core.kernels.lora_linear import add_low_rank_update, low_rank_linear

NAMES = ("x", "weight", "bias", "A", "B")


def make_inputs(lead=(2, 5), n=6, m=4, r=3, bias=True):
    """`x, W, b, A, B`, of which x, A and B need gradients."""
    x, W, b, A, B = (normal(*shape, seed=i) for i, shape in enumerate([(*lead, n), (m, n), (m,), (r, n), (m, r)]))
    return x.requires_grad_(), W, b if bias else None, A.requires_grad_(), B.requires_grad_()


def separate_operations(x, W, b, A, B, scale, dropout=0.0):
    return F.linear(x, W, b) + scale * F.linear(F.linear(F.dropout(x, dropout), A), B)


def sum_of_both(x, W, b, A, B, scale, dropout=0.0):
    return add_low_rank_update(F.linear(x, W, b), x, A, B, scale, dropout)


def compute(function, inputs, *options):
    """Return the output and the gradient of each input, for an arbitrary gradient of the output."""
    inputs = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    torch.manual_seed(7)
    y = function(*inputs, *options)
    y.backward(normal(*y.shape, seed=8).to(y.dtype))
    return {"y": y.detach()} | {n: t.grad for n, t in zip(NAMES, inputs, strict=True) if t is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


functions = pytest.mark.parametrize("function", [low_rank_linear, sum_of_both])


@functions
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    r=st.integers(0, 4),
    bias=st.booleans(),
    scale=st.floats(0.01, 8),
    dropout=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
)
def test_shapes(function, lead, n, m, r, bias, scale, dropout):
    inputs = make_inputs(lead, n, m, r, bias)
    assert_equal(compute(function, inputs, scale, dropout), compute(separate_operations, inputs, scale, dropout))


@functions
@given(needed=st.lists(st.booleans(), min_size=4, max_size=4).filter(any), dropout=st.sampled_from([0.0, 0.3]))
def test_any_input_needs_gradients(function, needed, dropout):
    needed.insert(1, False)  # the weight is frozen
    inputs = [t.detach().requires_grad_(need) for t, need in zip(make_inputs(), needed, strict=True)]
    assert_equal(compute(function, inputs, 0.7, dropout), compute(separate_operations, inputs, 0.7, dropout))


@functions
def test_not_contiguous(function):
    """A Conv1D's weight, an x and a gradient in other memory layouts."""
    _, W, b, A, B = make_inputs()
    inputs = [normal(5, 2, 6).transpose(0, 1).requires_grad_(), W.t().contiguous().t(), b, A, B]
    found, expected = (
        compute(lambda *a, f=f: f(*a).transpose(0, 1), inputs, 0.7) for f in (function, separate_operations)
    )
    assert_equal(found, expected)
    # The gradient of a sum is one number, expanded.
    found, expected = (torch.autograd.grad(f(*inputs, 0.7).sum(), A)[0] for f in (function, separate_operations))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_dropout_is_drawn_again():
    inputs = make_inputs((40,), n=50)
    torch.manual_seed(3)
    y = low_rank_linear(*inputs, 0.5, 0.4)
    torch.rand(9)  # another draw before the backward pass
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    expected = separate_operations(*inputs, 0.5, 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    expected_grad = torch.autograd.grad(expected.sum(), inputs[3])[0]
    torch.testing.assert_close(inputs[3].grad, expected_grad, rtol=1e-12, atol=1e-13)


@functions
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_base(function, adapter_dtype):
    x, W, b, A, B = (t.detach() for t in make_inputs((64,), n=48, m=40, r=8))
    x, W, b, A, B = x.bfloat16(), W.bfloat16(), b.bfloat16(), A.to(adapter_dtype), B.to(adapter_dtype)
    inputs = [x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()]
    found = compute(function, inputs, 0.5)
    assert [found[k].dtype for k in "yxAB"] == [torch.bfloat16, torch.bfloat16, adapter_dtype, adapter_dtype]
    exact = compute(separate_operations, [t.double() for t in inputs], 0.5)
    for name in "yxAB":
        assert (found[name].double() - exact[name]).norm() / exact[name].norm() < 0.01, name


def test_autocast():
    inputs = [t.detach().float().requires_grad_(t.requires_grad) for t in make_inputs((64,), n=48, m=40, r=8)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = compute(separate_operations, inputs, 0.5)
        for function in (low_rank_linear, sum_of_both):
            assert "LowRank" not in function(*inputs, 0.5).grad_fn.name()
            found = compute(function, inputs, 0.5)
            assert found["y"].dtype == torch.bfloat16
            for name, value in expected.items():
                if value is not None:
                    assert found[name].dtype == value.dtype
                    assert (found[name].double() - value.double()).norm() / value.double().norm() < 0.02, name


@functions
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiler_sees_plain_operators(function, dropout):
    inputs = make_inputs()
    with patch("torch.compiler.is_compiling", return_value=True):
        assert "LowRank" not in function(*inputs, 0.7).grad_fn.name()
        found = compute(function, inputs, 0.7, dropout)
    assert_equal(found, compute(separate_operations, inputs, 0.7, dropout))


def test_second_derivative_is_refused():
    x, *rest = make_inputs()
    (grad,) = torch.autograd.grad(low_rank_linear(x, *rest, 0.7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- memory -----------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """SmolLM2's q, k and v: 9 heads of 64, of which k and v have 3."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(576, n, bias=False) for n in (576, 192, 192))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_by_q_k_v(dropout, capsys):
    """Bytes saved for the backward pass, relative to their input in bf16."""

    def measure(library):
        torch.manual_seed(0)
        config = library.LoraConfig(r=16, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"])
        model = library.get_peft_model(Projections().bfloat16(), config).train()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        x = torch.randn(1, 1024, 576).bfloat16().requires_grad_()
        return storage_bytes(saved_for_backward(lambda: model(x), list(model.parameters()))) / storage_bytes([x])

    ours, theirs = measure(slimtune), measure(peft)
    with capsys.disabled():
        print(f"\nsaved by q, k, v, × their bf16 input, dropout {dropout}: {ours:.3f}; peft {theirs:.1f}")
    assert ours <= 1.15
    assert theirs > 5


@functions
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_frozen_A_saves_no_x(function, dropout):
    x, W, b, A, B = make_inputs((100,), n=80)
    A.requires_grad_(False)
    saved = saved_for_backward(lambda: function(x, W, b, A, B, 0.5, dropout), [W, A, B])
    assert [t.shape for t in saved if t.dtype != torch.uint8] == [(100, 3)]  # z, and random states in uint8


def test_frozen_B_saves_no_z():
    x, W, b, A, B = make_inputs((100,), n=80)
    B.requires_grad_(False)
    saved = saved_for_backward(lambda: low_rank_linear(x, W, b, A, B, 0.5), [W, A, B])
    assert [t.shape for t in saved] == [x.shape]


@functions
def test_without_gradients(function):
    inputs = make_inputs()
    with torch.no_grad():
        y = function(*inputs, 0.7)
    assert y.grad_fn is None
    assert_equal({"y": y}, {"y": separate_operations(*inputs, 0.7).detach()})
