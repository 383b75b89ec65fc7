"""HiRA beside the contract: nothing of the weight's size is kept, and what lies below gets its gradient through it."""

from __future__ import annotations

import pytest
import torch
from models_zoo import gemma3, gpt2, llama, run, shake, tokens

from slimtune import LoraConfig, get_peft_model
from slimtune.errors import ConfigError, TargetError
from slimtune.methods.hira import HiraConfig

Q = {"target_modules": ["q_proj"], "r": 2}


@pytest.mark.parametrize(
    ("base", "name"), [(llama, "model.layers.0.self_attn.q_proj"), (gpt2, "transformer.h.0.attn.c_attn")]
)
def test_nothing_of_the_weights_size_is_kept(base, name):
    model = get_peft_model(base(), HiraConfig(r=2, target_modules=[name]))
    layer, x, kept = model.get_submodule(name), torch.randn(3, 32, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    assert kept
    assert all(t.untyped_storage().data_ptr() in own for t in kept)


def test_a_lora_below_gets_its_gradient_through_the_weight():
    model = get_peft_model(llama(), LoraConfig(**Q))
    model.add_adapter("above", HiraConfig(**Q))
    model.set_adapter(["default", "above"])
    shake(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(5, 32, dtype=torch.float64)
    trained = [p for p in layer.adapters.parameters() if p.requires_grad]
    found = torch.autograd.grad(layer(x).square().sum(), trained)
    low, high = layer.adapters["default"], layer.adapters["above"]
    A, B, scale = low.low_rank_factors()
    weight = layer.weight + scale * B @ A
    expected = torch.autograd.grad((x @ (weight * (1 + high.hira_B @ high.hira_A)).t()).square().sum(), trained)
    assert len(trained) == 4
    assert all((f - e).abs().max() < 1e-9 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("base", [llama, gemma3])
def test_an_embedding_merges_as_it_runs_scaled_or_not(base):
    """PEFT's adds an unscaled change to a scaled embedding, and merges another one than it runs."""
    model = get_peft_model(base(), HiraConfig(r=2, target_modules=["embed_tokens"])).eval()
    assert torch.equal(run(model), run(base()))
    shake(model)
    expected = run(model)
    assert (expected - run(base())).abs().max() > 1e-3
    plain = model.merge_adapter() or model
    assert (run(plain) - expected).abs().max() < 1e-9


def test_dropout_is_there_while_training():
    model = get_peft_model(llama(), HiraConfig(hira_dropout=0.5, **Q)).eval()
    shake(model)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_it_trains_under_autocast():
    model = get_peft_model(llama(dtype=torch.float32), HiraConfig(r=2, target_modules="all-linear"))
    shake(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_layer_has_its_own_rank():
    model = get_peft_model(llama(), HiraConfig(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"v_proj": 2}))
    assert model.get_submodule("model.layers.1.self_attn.v_proj").adapters["default"].hira_A.shape == (2, 32)
    with pytest.raises(TargetError, match="rank_pattern"):
        get_peft_model(llama(), HiraConfig(target_modules=["q_proj"], rank_pattern={"v_proj": 2}))


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"hira_dropout": 1}, {"init_weights": "pissa"}, {"init_weights": None}, {"rank_pattern": {"q": 0}}],
)
def test_what_is_out_of_range_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HiraConfig(**wrong)
