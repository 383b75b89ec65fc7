"""LoRA+ and LoRA-FA: learning rates of A and B, and the memory a frozen A saves."""

import json
from functools import partial

import peft
import pytest
import torch
from models_zoo import llama
from peft.optimizers import create_loraplus_optimizer as pefts_loraplus
from torch import nn

import slimtune
from slimtune import LoraConfig, create_loraplus_optimizer, get_peft_model, parameter_groups
from slimtune.adapters.base import BaseForward, Site
from slimtune.errors import ConfigError
from slimtune.train_step.optimizer import build_optimizer

TARGETS = {"target_modules": ["q_proj", "embed_tokens"]}


def rate_of(groups, model):
    of = {id(p): g["lr"] for g in groups for p in g["params"]}
    return {n: of[id(p)] for n, p in model.named_parameters() if p.requires_grad}


def test_groups_give_b_its_rate():
    model = get_peft_model(llama(), LoraConfig(**TARGETS, lr_ratio=16))
    rates = rate_of(parameter_groups(model, 1e-3, 0.1), model)
    assert [r for n, r in rates.items() if "_B" in n] == pytest.approx([16e-3] * 3)
    assert {r for n, r in rates.items() if "_A" in n} == {1e-3}


def test_vectors_do_not_decay():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    groups = parameter_groups(model, 1e-3, 0.1)
    assert {(g["params"][0].dim(), g["weight_decay"]) for g in groups} == {(2, 0.1), (1, 0.0)}


def test_training_follows_the_rates():
    model = get_peft_model(llama(), LoraConfig(**TARGETS, lr_ratio=8))
    rates = rate_of(build_optimizer(model, lr=1e-3).param_groups, model)
    assert [r for n, r in rates.items() if "_B" in n] == pytest.approx([8e-3] * 3)


def test_loraplus_gives_each_parameter_pefts_rate():
    models = [home.get_peft_model(llama(), home.LoraConfig(**TARGETS)) for home in (slimtune, peft)]
    makers = (create_loraplus_optimizer, pefts_loraplus)
    mine, theirs = (
        make(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
        for make, m in zip(makers, models, strict=True)
    )

    def counted(optimizer):
        return sorted((p.shape, g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"])

    assert counted(mine) == counted(theirs)


def test_a_frozen_a_keeps_no_input():
    layer = nn.Linear(64, 8).requires_grad_(False)
    site = Site("layer", "linear", 64, 8, torch.device("cpu"), torch.float32, layer)
    x = torch.randn(100, 64, requires_grad=True)
    kept = {}
    for freeze in (False, True):
        delta, sizes = LoraConfig(r=2, freeze_a=freeze).build(site), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            delta.forward_with_base(BaseForward(layer, partial(nn.Linear.forward, layer)), x)
        kept[freeze] = max(sizes)
    assert kept == {False: 100 * 64, True: 8 * 64}  # the input; the weight


def test_a_frozen_a_does_not_move():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], freeze_a=True))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_B" in n for n in names)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names


def test_a_frozen_a_at_an_embedding_is_refused():
    with pytest.raises(ConfigError, match=r"freeze_a is True, and model\.embed_tokens is an embedding"):
        get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"], freeze_a=True))


def test_other_readers_see_nothing_new(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert not {"lr_ratio", "freeze_a"} & set(json.loads((tmp_path / "adapter_config.json").read_text()))
    LoraConfig(lr_ratio=2, freeze_a=True).save_pretrained(tmp_path)
    again = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert (again.lr_ratio, again.freeze_a) == (2, True)
