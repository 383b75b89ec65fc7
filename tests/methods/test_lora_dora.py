"""DoRA beyond the contract: memory, 16-bit bases, other adapters below it."""

import copy

import pytest
import torch
from models_zoo import gpt2, llama, run, shake, tokens
from reference import saved_for_backward, storage_bytes

from slimtune import IA3Config, LoraConfig, get_peft_model
from slimtune.methods.lora.dora import row_norms


def dora(**more):
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True, **more})


def test_saves_little_more_memory_than_lora():
    def count_saved_bytes(config):
        base = llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
        model, ids = get_peft_model(base, config).train(), tokens(2, 32)
        run = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        return storage_bytes(saved_for_backward(run, ignore=list(model.parameters())))

    assert count_saved_bytes(dora()) < 1.25 * count_saved_bytes(dora(use_dora=False))


def test_row_norms_are_those_of_the_full_matrix():
    W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((7, 5), (3, 5), (7, 3)))
    found = row_norms(W.square().sum(1), W, A, B, 1.7)
    assert torch.allclose(found, (W + 1.7 * B @ A).norm(dim=1), rtol=1e-12)


def test_a_row_of_zeros_trains():
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3] = 0
    before = run(base)
    model = get_peft_model(base, dora()).eval()
    assert torch.equal(run(model), before)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_scales_the_adapter_below(base):
    """(IA)³ below also changes the bias, which GPT-2 has."""
    targets = {"llama": "o_proj", "gpt2": "c_attn"}[base.__name__]
    settings = {"target_modules": [targets]}
    model = get_peft_model(base(), IA3Config(**settings, feedforward_modules=[]), "below")
    shake(model)
    model.add_adapter("above", dora(**settings))
    model.set_adapter(["below", "above"])
    shake(model)
    model.eval()
    expected = run(model)
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9


def test_a_trained_bias_gets_its_gradient():
    model = get_peft_model(gpt2(), dora(target_modules=["c_attn"], bias="lora_only")).eval()
    shake(model)
    ids = tokens()
    bias = next(p for n, p in model.named_parameters() if "trained_copies" in n and p.requires_grad)

    def loss_of():
        return model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum()

    loss_of().backward()
    step, direction = 1e-5, torch.randn(bias.shape, generator=torch.Generator().manual_seed(0), dtype=bias.dtype)
    with torch.no_grad():
        bias.add_(step * direction)
        up = loss_of()
        bias.sub_(2 * step * direction)
        down = loss_of()
    assert ((up - down) / (2 * step)).item() == pytest.approx((bias.grad * direction).sum().item(), rel=1e-5)


def test_a_changed_base_is_measured_again():
    model = get_peft_model(llama(), dora()).eval()
    shake(model)
    run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(2)
    expected = run(twin)
    twin.merge_adapter()
    assert (run(twin) - expected).abs().max() < 1e-9
