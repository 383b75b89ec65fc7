"""Adapted layers under what other libraries do to modules: hooks, replicas, checkpointing, replaced forwards."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules

from slimtune import LoraConfig, get_peft_model
from slimtune.errors import TargetError, UsageError

IDS = torch.arange(12)[None]
RANDOM = {"r": 4, "init_lora_weights": False}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_adapter_works_on_a_base_with_accelerates_hooks(tiny_llama):
    plain = logits(get_peft_model(tiny_llama(), LoraConfig(**RANDOM)).float())
    base = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    untouched = logits(base)
    torch.manual_seed(0)
    first = get_peft_model(tiny_llama(), LoraConfig(**RANDOM))
    torch.manual_seed(0)
    hooked = get_peft_model(base, LoraConfig(**RANDOM))
    assert torch.equal(logits(hooked), logits(first))
    assert not torch.equal(logits(hooked), untouched)
    assert plain.shape == untouched.shape
    assert torch.equal(logits(hooked.unload()), untouched)


def test_hooks_that_come_after_the_adapter_survive_its_removal(tiny_llama):
    untouched = logits(tiny_llama())
    model = dispatch_model(get_peft_model(tiny_llama(), LoraConfig(**RANDOM)), {"": "cpu"}, force_hooks=True)
    assert not torch.equal(logits(model), untouched)
    base = model.unload()
    assert torch.equal(logits(base), untouched)
    remove_hook_from_submodules(base)
    assert torch.equal(logits(base), untouched)


def test_a_replaced_forward_is_refused(tiny_llama):
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x
    with pytest.raises(TargetError, match="forward of a Linear was replaced") as e:
        get_peft_model(model, LoraConfig(r=2))
    assert e.value.exit_code == 2
    assert type(model).__mro__[1].__name__ != "PeftModel"


def test_a_replica_runs_with_its_own_adapter():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(model, LoraConfig(target_modules=["0"], modules_to_save=None, **RANDOM))
    layer = model[0]
    replica = layer._replicate_for_data_parallel()
    weight = torch.ones(4, 4)
    replica.weight, replica.bias = weight, torch.zeros(4)  # as DataParallel sets them
    assert replica.weight is weight
    x = torch.rand(2, 4)
    expected = layer.adapters["default"](x, x @ weight.t())
    assert torch.allclose(replica(x), expected)
    assert not torch.equal(layer.weight, weight)


def test_a_deleted_weight_is_missing():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(model, LoraConfig(target_modules=["0"]))
    del model[0].weight
    assert not hasattr(model[0], "weight")


def test_unload_takes_the_gradient_hook_away(tiny_llama):
    base = tiny_llama()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    embeddings = base.get_input_embeddings()
    before = len(embeddings._forward_hooks)
    model = get_peft_model(base, LoraConfig(r=2))
    assert len(embeddings._forward_hooks) > before or before
    model.unload()
    assert len(embeddings._forward_hooks) <= before


def test_a_plain_module_around_a_checkpointed_model(tiny_llama):
    inner = tiny_llama()
    getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)()
    outer = torch.nn.ModuleDict({"inner": inner})
    assert get_peft_model(outer, LoraConfig(target_modules=["q_proj"])).match_report().adapted


def test_two_adapters_cannot_own_one_module(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(r=2, modules_to_save=["lm_head"]))
    for act in (model.set_adapter, model.merge_adapter):
        with pytest.raises(UsageError, match="both have their own copy of lm_head"):
            act(["default", "second"])
    assert model.active_adapters == ["default"]
    with pytest.raises(UsageError, match="no adapter is given"):
        model.set_adapter([])


def test_a_merged_head_is_not_the_adapters_own(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, modules_to_save=["lm_head"]))
    model.merge_adapter()
    head = model.lm_head
    assert head._parameters["weight"].data_ptr() != head.trained_copies["default"].weight.data_ptr()
    with pytest.raises(UsageError, match="is merged into the base"):
        model.set_adapter("default")
