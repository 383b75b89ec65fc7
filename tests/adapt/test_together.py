"""Maps that read one input are computed in one step: the same values, whoever is called, in whatever order."""

from __future__ import annotations

import pytest
import torch
from models_zoo import gpt2, llama, qwen2, shake, tokens

from slimtune import LoraConfig, get_peft_model

CONFIG = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, "bias": "lora_only"}


def adapted(make=llama, **more):
    torch.manual_seed(1)
    model = get_peft_model(make(), LoraConfig(**{**CONFIG, **more})).train()
    shake(model)
    return model


def together(model):
    return model._attached.running.together


def gradients(model, ids, apart=False):
    if apart:
        together(model).groups = {m: (m,) for m in model.modules()}
    model.zero_grad()
    torch.manual_seed(5)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_gradients_are_those_of_each_map_alone(make):
    model, ids = adapted(make), tokens()
    gradients(model, ids)  # what is seen first
    sizes = sorted({len(g) for g in together(model).groups.values()})
    assert sizes == ([1] if make is gpt2 else [1, 2, 3])
    got = gradients(model, ids)
    wanted = gradients(model, ids, apart=True)
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12)


def test_dropout_is_drawn_by_each_map_for_itself():
    model, ids = adapted(lora_dropout=0.3), tokens()
    gradients(model, ids)
    got = gradients(model, ids)
    wanted = gradients(model, ids, apart=True)
    assert all(torch.equal(g, wanted[n]) for n, g in got.items())


@pytest.fixture
def layer():
    model = adapted()
    with torch.no_grad():
        model(input_ids=tokens())
    return model, model.model.layers[0].self_attn


def test_any_order_of_calls_and_any_input(layer):
    _, at = layer
    one, other = (torch.randn(1, 4, 32, dtype=torch.float64) for _ in range(2))
    alone = {}
    with torch.no_grad():  # then each computes for itself
        for name in "qkv":
            for x in (one, other):
                alone[name, id(x)] = getattr(at, f"{name}_proj")(x)
    for calls in ["v1 q1 k1", "k1 q2 v1", "q1 q1 k1 v1", "q2 k1 v2 q1", "v1 k1"]:
        for call in calls.split():
            x = one if call[1] == "1" else other
            y = getattr(at, f"{call[0]}_proj")(x)
            torch.testing.assert_close(y, alone[call[0], id(x)], rtol=1e-12, atol=1e-12)


def test_a_group_that_is_not_all_called_for_is_none_any_more(layer):
    model, at = layer
    groups = together(model).groups
    at.q_proj(torch.randn(1, 4, 32, dtype=torch.float64))
    assert len(groups[at.q_proj]) == 3
    at.k_proj(torch.randn(1, 4, 32, dtype=torch.float64))
    assert len(groups[at.q_proj]) == len(groups[at.k_proj]) == 1


def test_an_adapter_that_comes_or_goes_is_seen(layer):
    model, _ = layer
    ids = tokens()
    model.add_adapter("second", LoraConfig(**CONFIG))
    model.set_adapter("second")
    gradients(model, ids)
    got = gradients(model, ids)
    wanted = gradients(model, ids, apart=True)
    assert all("second" in n for n in got)
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12)
