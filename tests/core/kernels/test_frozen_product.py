"""float32 products by oneDNN equal torch's own, forward and backward."""

import pytest
import torch
from torch import nn

from slimtune import LoraConfig, get_peft_model
from slimtune.core.kernels import frozen_product
from slimtune.core.kernels.cross_entropy import chunked_cross_entropy
from slimtune.core.kernels.frozen_product import FrozenLinear, use_faster_frozen_products
from slimtune.core.kernels.lora_linear import low_rank_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    monkeypatch.setattr(frozen_product, "_has_slow_mkl", lambda: True)


def make_layer(bias=True):
    layer = nn.Linear(48, 40, bias=bias).requires_grad_(False)
    use_faster_frozen_products(layer)
    return layer


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 5, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_gradient_equal_float64(shape, bias):
    layer, x = make_layer(bias), torch.randn(shape, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(*shape[:-1], 40)
    y = layer(x)
    y.backward(grad)
    exact = nn.functional.linear(wide, layer.weight.double(), layer.bias.double() if bias else None)
    exact.backward(grad.double())
    assert type(layer) is FrozenLinear
    assert torch.allclose(y.double(), exact, atol=1e-5)
    assert torch.allclose(x.grad.double(), wide.grad, atol=1e-5)


def test_low_rank_update_equals_the_separate_products():
    layer, A, B = make_layer(), torch.randn(4, 48), torch.randn(40, 4)
    weight, bias = layer.weight, layer.bias
    inputs = [torch.randn(6, 48), A, B]
    fused, plain = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    low_rank_linear(fused[0], weight, bias, *fused[1:], 0.5).square().sum().backward()
    x, A, B = plain
    (x @ weight.t() + bias + 0.5 * x @ A.t() @ B.t()).square().sum().backward()
    for one, other in zip(fused, plain, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_loss_of_the_head_equals_cross_entropy():
    h, weight, targets = torch.randn(9, 48), make_layer(bias=False).weight, torch.arange(9)
    one, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    nll = chunked_cross_entropy(one, weight, targets)
    plain = nn.functional.cross_entropy(other @ weight.t(), targets, reduction="none")
    nll.sum().backward()
    plain.sum().backward()
    assert torch.allclose(nll, plain, atol=1e-5)
    assert torch.allclose(one.grad, other.grad, atol=1e-5)


def test_layer_whose_bias_trains_gets_its_gradient():
    layer = make_layer()
    layer.bias.requires_grad_()
    layer(torch.randn(3, 48)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 3.0))


def test_both_products_run_in_onednn(monkeypatch):
    """Also the backward pass, where autograd hands the weight back."""
    calls, linear = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a) or linear(*a))
    make_layer()(torch.randn(3, 48, requires_grad=True)).sum().backward()
    assert len(calls) == 2


def test_layers_of_other_models_keep_their_bits():
    net, x = nn.Sequential(nn.Linear(512, 512, bias=False)), torch.randn(4, 512)
    before = net(x)
    assert torch.equal(get_peft_model(net, LoraConfig(target_modules=["0"]))(x), before)


def test_only_plain_float32_layers_change():
    own_forward = type("Own", (nn.Linear,), {})
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), own_forward(4, 4), nn.Linear(4, 4))
    use_faster_frozen_products(model)
    assert [isinstance(m, FrozenLinear) for m in model] == [False, False, True]
