"""HiRA beyond the contract: memory, gradients of an adapter below it, embeddings."""

import pytest
import torch
from models_zoo import gemma3, gpt2, llama, run, shake

from slimtune import LoraConfig, get_peft_model
from slimtune.methods.hira import HiraConfig

Q = {"target_modules": ["q_proj"], "r": 2}


@pytest.mark.parametrize(
    ("base", "name"), [(llama, "model.layers.0.self_attn.q_proj"), (gpt2, "transformer.h.0.attn.c_attn")]
)
def test_backward_saves_nothing_of_the_weights_size(base, name):
    model = get_peft_model(base(), HiraConfig(r=2, target_modules=[name]))
    layer, x, kept = model.get_submodule(name), torch.randn(3, 32, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    assert kept
    assert all(t.untyped_storage().data_ptr() in own for t in kept)


def test_a_lora_below_gets_its_gradient():
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
def test_a_scaled_embedding_merges_as_it_runs(base):
    """PEFT adds an unscaled change to a scaled embedding, and its merge differs from its forward."""
    model = get_peft_model(base(), HiraConfig(r=2, target_modules=["embed_tokens"])).eval()
    assert torch.equal(run(model), run(base()))
    shake(model)
    expected = run(model)
    assert (expected - run(base())).abs().max() > 1e-3
    plain = model.merge_adapter() or model
    assert (run(plain) - expected).abs().max() < 1e-9
