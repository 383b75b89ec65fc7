"""The weights a merge writes are those that merging in place leaves, for every method; nothing in the model changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import CASES
from models_zoo import llama, shake
from safetensors.torch import load_file

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.export.gptq_rounding import round_with_inputs
from slimtune.export.merged_weights import LazyMergedStateDict, save_merged_weights


def adapted(config, base=None):
    model = get_peft_model(llama() if base is None else base, config)
    shake(model)
    return model.eval()


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_merging_in_place(name):
    model = adapted(CASES[name]())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        merged = {n: t.clone() for n, t in LazyMergedStateDict(model).items()}
    except MergeUnsupported:
        with pytest.raises(MergeUnsupported):
            model.merge_and_unload()
        return
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() <= expected.keys()
    assert all(torch.equal(merged[n], expected[n]) for n in merged)
    omitted = expected.keys() - merged.keys()  # tied to tensors that are included
    assert {expected[n].data_ptr() for n in omitted} <= {expected[n].data_ptr() for n in merged}


def test_changed_tensors_not_rounded_unchanged_not_copied():
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"]), llama().bfloat16())
    weights = LazyMergedStateDict(model)
    changed, unchanged = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    assert (weights[changed].dtype, weights[unchanged].dtype) == (torch.float32, torch.bfloat16)
    assert weights[unchanged].data_ptr() == dict(model.named_parameters())[unchanged].data_ptr()
    assert torch.equal(weights[changed], copy.deepcopy(model).float().merge_and_unload().state_dict()[changed])


def test_without_adapters_it_is_the_base():
    base = llama()
    expected = {n: t.clone() for n, t in base.state_dict().items()}
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    weights = LazyMergedStateDict(adapted(config, base), [])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in weights.items())


# --- rounding --------------------------------------------------------------------------------------------------------


def correlated_inputs(n, width, seed):
    """Inputs dominated by a few directions, as a layer's are."""
    g = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(n, width, generator=g)
    return torch.randn(n, 4, generator=g) @ torch.randn(4, width, generator=g) + noise


def output_error(rounded, weight, x):
    return ((rounded.double() - weight.double()) @ x.double().t()).square().sum().item()


@given(st.integers(1, 40), st.integers(2, 150), st.integers(1, 200), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=25)
def test_rounding_is_never_worse_than_to_nearest(out, width, n, dtype):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out * width))
    x = correlated_inputs(n, width, n)
    rounded = round_with_inputs(weight, x, dtype)
    assert (rounded.dtype, rounded.shape) == (dtype, weight.shape)
    assert output_error(rounded, weight, x) <= output_error(weight.to(dtype), weight, x) * 1.01
    assert (rounded.float() - weight).abs().max() <= 0.05 * weight.abs().max()


def test_only_weights_with_enough_inputs_are_rounded_with_them(tmp_path):
    model = adapted(LoraConfig(r=4, target_modules="all-linear"))
    name, width = "model.layers.0.mlp.up_proj", model.config.hidden_size
    inputs = {name: correlated_inputs(512, width, 1), "model.layers.1.mlp.up_proj": torch.randn(3, width)}
    saved = []
    for i, given_inputs in enumerate(({}, inputs)):
        (tmp_path / str(i)).mkdir()
        save_merged_weights(LazyMergedStateDict(model), tmp_path / str(i), torch.bfloat16, given_inputs)
        saved.append(load_file(tmp_path / str(i) / "model.safetensors"))
    assert {n for n in saved[0] if not torch.equal(saved[0][n], saved[1][n])} == {f"{name}.weight"}
    exact = LazyMergedStateDict(model)[f"{name}.weight"]
    nearest, rounded = (output_error(weights[f"{name}.weight"], exact, inputs[name]) for weights in saved)
    assert rounded < 0.5 * nearest
