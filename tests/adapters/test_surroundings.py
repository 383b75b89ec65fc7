"""Adapted layers under what other libraries do to modules: hooks, replicas, checkpointing, replaced forwards."""

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from slimtune import LoraConfig, get_peft_model

IDS = torch.arange(12)[None]
RANDOM = {"r": 4, "init_lora_weights": False}


def run(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def enable_checkpointing(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def adapt(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**RANDOM))


def test_adapter_on_a_base_with_accelerate_hooks(tiny_llama):
    base = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    expected, plain = run(adapt(tiny_llama())), run(base)
    hooked = adapt(base)
    assert torch.equal(run(hooked), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(run(hooked.unload()), plain)


def test_later_accelerate_hooks_survive_unload(tiny_llama):
    plain = run(tiny_llama())
    model = dispatch_model(adapt(tiny_llama()), {"": "cpu"}, force_hooks=True)
    assert not torch.equal(run(model), plain)
    base = model.unload()
    assert torch.equal(run(base), plain)
    remove_hook_from_submodules(base)
    assert torch.equal(run(base), plain)


def test_replica_runs_with_its_own_weights():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **RANDOM))
    layer, weight, x = model[0], torch.ones(4, 4), torch.rand(2, 4)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = weight, torch.zeros(4)  # as DataParallel sets them
    assert replica.weight is weight
    assert torch.allclose(replica(x), layer.adapters["default"](x, x @ weight.t()))
    assert not torch.equal(layer.weight, weight)
    del layer.weight
    assert not hasattr(layer, "weight")


def test_unload_removes_the_gradient_hook(tiny_llama):
    base = enable_checkpointing(tiny_llama())
    hooks = base.get_input_embeddings()._forward_hooks
    before = len(hooks)
    model = adapt(base)
    assert len(hooks) > before or before
    model.unload()
    assert len(hooks) <= before


def test_plain_module_around_a_checkpointed_model(tiny_llama):
    outer = nn.ModuleDict({"inner": enable_checkpointing(tiny_llama())})
    assert get_peft_model(outer, LoraConfig(target_modules=["q_proj"])).match_report().adapted
