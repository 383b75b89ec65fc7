"""PEFT's names on adapted models and layers, with HF PEFT's values as the oracle."""

import copy
import io

import peft
import pytest
import torch
from models_zoo import llama, roberta_classifier, run, shake, tokens
from torch import nn

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.compat.model_names import PeftModelForCausalLM
from slimtune.compat.tuner_layers import BaseTunerLayer, IA3Layer, LoraLayer, ModulesToSaveWrapper, get_peft_layer_class
from slimtune.compat.tuner_models import IA3Model, LoraModel

SETTINGS = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model():
    return shake(get_peft_model(llama(), LoraConfig(**SETTINGS))).eval()


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_layer_attributes_are_those_of_peft(settings):
    theirs, ours = (
        q_proj(home.get_peft_model(llama(), home.LoraConfig(**SETTINGS, **settings))) for home in (peft, slimtune)
    )
    for name in ("scaling", "r", "lora_alpha", "active_adapters", "merged", "merged_adapters", "disable_adapters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("lora_A", "lora_B", *(["lora_magnitude_vector"] if settings.get("use_dora") else [])):
        assert getattr(ours, name)["default"].weight.shape == getattr(theirs, name).default.weight.shape
    assert ours.base_layer.weight.shape == theirs.base_layer.weight.shape
    assert not hasattr(ours.get_base_layer(), "base_layer")
    assert not hasattr(ours, "ia3_l")


def test_values_written_through_a_layer_reach_the_forward(model):
    layer, before = q_proj(model), run(model)
    layer.scaling["default"] *= 2
    doubled = run(model)
    layer.unscale_layer()
    assert torch.equal(run(model), before)
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B.default.weight * 2)
    assert (run(model) - doubled).abs().max() < 1e-12
    assert (doubled - before).abs().max() > 1e-6


def test_one_layer_is_merged_or_disabled(model):
    layer, before = q_proj(model), run(model)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    assert (layer.weight - weight - layer.get_delta_weight("default")).abs().max() < 1e-12
    assert model.get_model_status().merged_adapters == "irregular"
    assert (run(model) - before).abs().max() < 1e-9
    layer.unmerge()
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    assert not torch.equal(run(model), before)
    model.set_adapter("default")
    assert torch.equal(run(model), before)


def test_isinstance(model):
    layer = q_proj(model)
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer, get_peft_layer_class(LoraLayer, nn.Linear))
    assert not isinstance(layer, IA3Layer)
    assert isinstance(model.base_model.lm_head, ModulesToSaveWrapper)
    assert not isinstance(model.lm_head, BaseTunerLayer)
    assert isinstance(model, PeftModelForCausalLM)
    assert isinstance(model.base_model, LoraModel)
    assert not isinstance(model.base_model, IA3Model)
    assert IA3Model.uses_shared_state is False


def test_both_readings_of_base_model(model):
    assert model.model.model.layers is model.base_model.layers
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapter == ["default", "other"]
    embedding = nn.Embedding(8, 16)
    model.set_input_embeddings(embedding)
    assert model.base_model.embed_tokens is embedding


def test_base_model_of_a_plain_module_with_a_child_named_model():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = nn.ModuleDict({"linear": nn.Linear(2, 2)}), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.model.linear(x))

    model = get_peft_model(Whole(), LoraConfig(target_modules=["linear"]))
    assert isinstance(model.base_model, LoraModel)
    assert model.base_model.model.model.linear is model.model.linear
    assert torch.equal(model.base_model(torch.ones(2)), model(torch.ones(2)))
    model.base_model.head = head = nn.Linear(2, 3)
    model.base_model.eval()
    assert (model.head is head, head.training, model.training) == (True, False, False)


def test_base_layer_of_pissa_is_that_of_peft():
    base, found = nn.Sequential(nn.Linear(6, 4)), []
    for home in (peft, slimtune):
        config = home.LoraConfig(init_lora_weights="pissa", r=2, target_modules=["0"])
        layer = home.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
        found.append(torch.stack([layer.base_layer.weight.detach(), layer.get_delta_weight("default")]))
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_a_head_of_several_layers_is_one_trained_module():
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(roberta_classifier(), config)
    model.add_adapter("other", config)
    shake(model)
    head, x = model.eval().classifier, torch.randn(2, 3, 32, dtype=torch.float64)
    assert isinstance(head, ModulesToSaveWrapper)
    assert torch.equal(head.original_module(x), roberta_classifier().classifier(x))
    alone = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(head.modules_to_save[name](x), head(x))
        alone[name] = model(tokens()).logits
    rows = model(tokens(), adapter_names=["default", "other"]).logits
    assert (rows - torch.stack([alone["default"][0], alone["other"][1]])).abs().max() < 1e-12
    head.set_adapter("other")
    head.modules_to_save["other"].dense.weight = nn.Parameter(torch.zeros_like(head.dense.weight))
    assert not head.dense.weight.any()


def test_pickle_and_copy(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(run(other), run(model))
        assert type(other.unload()) is type(llama())
