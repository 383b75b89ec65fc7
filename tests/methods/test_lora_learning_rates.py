"""LoRA+ and LoRA-FA: learning rates of A and B, and the memory a frozen A saves."""

import json

import peft
import pytest
import torch
from models_zoo import llama
from one_layer import build, run_layer
from peft.optimizers import create_loraplus_optimizer as pefts_loraplus
from reference import saved_for_backward

import slimtune
from slimtune import LoraConfig, create_loraplus_optimizer, get_peft_model, parameter_groups
from slimtune.errors import ConfigError
from slimtune.train_step.optimizer import build_optimizer

TARGETS = {"target_modules": ["q_proj", "embed_tokens"]}


def trained_names(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "make_groups", [lambda m: parameter_groups(m, 1e-3, 0.1), lambda m: build_optimizer(m, lr=1e-3).param_groups]
)
def test_groups_give_b_its_rate(make_groups):
    model = get_peft_model(llama(), LoraConfig(**TARGETS, lr_ratio=16))
    rates = {id(p): g["lr"] for g in make_groups(model) for p in g["params"]}
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(16e-3 if "_B" in n else 1e-3)


def test_vectors_do_not_decay():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    groups = parameter_groups(model, 1e-3, 0.1)
    assert {(g["params"][0].dim(), g["weight_decay"]) for g in groups} == {(2, 0.1), (1, 0.0)}


def test_loraplus_gives_each_parameter_pefts_rate():
    def counted(home, make):
        model = home.get_peft_model(llama(), home.LoraConfig(**TARGETS))
        optimizer = make(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
        return sorted((p.shape, g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"])

    assert counted(slimtune, create_loraplus_optimizer) == counted(peft, pefts_loraplus)


def test_a_frozen_a_keeps_no_input():
    layer, x = torch.nn.Linear(64, 8).requires_grad_(False), torch.randn(100, 64, requires_grad=True)
    largest = []
    for freeze in (False, True):
        module = build(LoraConfig(r=2, freeze_a=freeze), (64, 8), torch.float32)
        saved = saved_for_backward(lambda module=module: run_layer(module, x, layer), ignore=list(layer.parameters()))
        largest.append(max(t.numel() for t in saved))
    assert largest == [100 * 64, 100 * 2]


def test_a_frozen_a_does_not_train():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], freeze_a=True))
    names = trained_names(model)
    assert names
    assert all("lora_B" in n for n in names)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert trained_names(model) == names
    with pytest.raises(ConfigError, match=r"freeze_a is True, and model\.embed_tokens is an embedding"):
        get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"], freeze_a=True))


def test_other_readers_see_nothing_new(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert not {"lr_ratio", "freeze_a"} & set(json.loads((tmp_path / "adapter_config.json").read_text()))
    LoraConfig(lr_ratio=2, freeze_a=True).save_pretrained(tmp_path)
    again = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert (again.lr_ratio, again.freeze_a) == (2, True)
