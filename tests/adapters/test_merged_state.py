"""What a merge would leave, module by module, is what a merge leaves; for every method, and nothing is written."""

from __future__ import annotations

import copy

import pytest
import torch
from methods.cases import CASES
from models_zoo import llama

from slimtune import LoraConfig, get_peft_model
from slimtune.adapters.base import MergeUnsupported
from slimtune.adapters.merged_state import MergedState


def adapted(config, base=None):
    model = get_peft_model(llama() if base is None else base, config)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=draws).to(p.dtype) * 0.05)
    return model.eval()


@pytest.mark.parametrize("name", sorted(CASES))
def test_it_is_what_merging_leaves(name):
    model = adapted(CASES[name]())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        found = {n: t.clone() for n, t in MergedState(model).items()}
    except MergeUnsupported:
        with pytest.raises(MergeUnsupported):
            model.merge_and_unload()
        return
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    wanted = model.merge_and_unload().state_dict()
    assert found.keys() <= wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in found)
    left = wanted.keys() - found.keys()  # tied to what is there
    assert {wanted[n].data_ptr() for n in left} <= {wanted[n].data_ptr() for n in found}


def test_what_is_merged_is_not_rounded_to_the_bases_dtype():
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"]), llama().bfloat16())
    state = MergedState(model)
    changed, left = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    assert (state[changed].dtype, state[left].dtype) == (torch.float32, torch.bfloat16)
    assert state[left].data_ptr() == dict(model.named_parameters())[left].data_ptr()
    wide = copy.deepcopy(model).float().merge_and_unload().state_dict()
    assert torch.equal(state[changed], wide[changed])


def test_without_adapters_it_is_the_base():
    base = llama()
    wanted = {n: t.clone() for n, t in base.state_dict().items()}
    state = MergedState(adapted(LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]), base), [])
    assert all(torch.equal(t, wanted[n]) for n, t in state.items())
    assert state.keys() == wanted.keys()


def test_a_method_that_changes_no_weight_is_refused_at_once():
    model = adapted(CASES["prefix_tuning"]())
    with pytest.raises(MergeUnsupported):
        MergedState(model)
