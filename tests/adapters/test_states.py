"""What stays right when calls overlap, fail half way, or come in an odd order."""

import threading

import pytest
import torch
from models_zoo import llama, qwen2, run, same_base, shake, snapshot, tokens
from torch import nn

from slimtune import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from slimtune.errors import TargetError, UsageError

QV = {"target_modules": ["q_proj", "v_proj"]}


def test_a_prefix_in_several_threads_is_each_call_alone():
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    plain, expected, wrong = run(llama()), run(model), []

    def work():
        for _ in range(30):
            if not torch.equal(run(model), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert torch.equal(run(model.unload()), plain)


@pytest.mark.parametrize("name", ["train", "items", "", "a.b", "__base__"])
def test_a_name_that_cannot_be_is_refused_and_leaves_nothing(name):
    model = llama()
    before, kinds = snapshot(model), {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(UsageError, match="cannot be the name of a new adapter"):
        get_peft_model(model, LoraConfig(**QV), name)
    assert same_base(model, before)
    assert {n: type(m) for n, m in model.named_modules()} == kinds


def test_an_adapter_that_fails_half_way_leaves_nothing():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    get_peft_model(model, LoraConfig(target_modules=["2"]))
    model[1].forward = lambda x: x
    with pytest.raises(TargetError, match="forward of a Linear was replaced"):
        model.add_adapter("second", LoraConfig(target_modules=["0", "1"]))
    assert list(model.peft_config) == ["default"]
    assert not any("second" in n for n, _ in model.named_parameters())
    assert type(model[0]) is nn.Linear


def test_containers_and_fast_paths_are_refused_by_name():
    with pytest.raises(TargetError, match="TransformerEncoderLayer, which reads the weight without calling the module"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), LoraConfig(target_modules=["linear1"]))


def test_mixed_rows_and_activation_checkpointing_are_refused_together():
    model = get_peft_model(llama(), LoraConfig(**QV))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UsageError, match="activation checkpointing"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])
    with torch.no_grad():
        model(input_ids=tokens(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}])
def test_mixed_rows_with_trained_biases_are_each_row_alone(settings):
    model = get_peft_model(qwen2(), LoraConfig(**QV, bias="lora_only", **settings)).eval()
    shake(model)
    model.add_adapter("b", LoraConfig(**QV, bias="lora_only", r=3, **settings))
    model.set_adapter("b")
    shake(model, seed=9)
    ids = tokens(3)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "b", "__base__"]).logits
        for at, name in enumerate(["default", "b"]):
            model.set_adapter(name)
            assert (mixed[at] - model(input_ids=ids[at : at + 1]).logits[0]).abs().max() < 1e-9
        with model.disable_adapter():
            assert (mixed[2] - model(input_ids=ids[2:]).logits[0]).abs().max() < 1e-9


def test_mixed_rows_seen_without_gradients_first_train_after():
    model = get_peft_model(llama(), LoraConfig(**QV, use_dora=True))
    model.add_adapter("b", LoraConfig(**QV))
    names = {"input_ids": tokens(), "adapter_names": ["default", "b"]}
    with torch.inference_mode():
        model(**names)
    model(**names, labels=tokens()).loss.backward()


def test_a_start_is_measured_on_the_base_whatever_stands_in_its_place():
    model = get_peft_model(llama(), LoraConfig(**QV, modules_to_save=["lm_head"])).eval()
    shake(model)
    model.add_adapter("dora", LoraConfig(target_modules=["lm_head", "q_proj"], use_dora=True))
    model.merge_adapter()
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"], use_dora=True))
    merged = run(model)
    model.unmerge_adapter()
    for name in ("dora", "late"):
        model.set_adapter(name)
        assert torch.equal(run(model), run(llama())), name
    model.set_adapter("default")
    assert (run(model) - merged).abs().max() < 1e-9


def test_what_would_break_a_disabled_model_is_refused():
    model = get_peft_model(llama(), LoraConfig(**QV))
    model.add_adapter("b", LoraConfig(**QV))
    with model.disable_adapter():
        for act in (model.unload, model.merge_adapter, lambda: model.delete_adapter("b")):
            with pytest.raises(UsageError, match="inside disable_adapter"):
                act()
    model.unload()


def test_an_adapter_named_twice_runs_once():
    model = get_peft_model(llama(), LoraConfig(**QV)).eval()
    shake(model)
    once = run(model)
    model.set_adapter(["default", "default"])
    assert torch.equal(run(model), once)


def test_a_forward_kept_by_a_wrapper_runs_after_unload():
    backbone = llama().model
    model = get_peft_model(backbone, PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"))
    kept = model.forward
    model.unload()
    assert torch.equal(kept(input_ids=tokens()).last_hidden_state, llama().model(input_ids=tokens()).last_hidden_state)


def test_a_frozen_base_stays_frozen_when_a_merge_makes_its_tied_head_two():
    base = llama(tie=True).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    shake(model)
    assert not any(p.requires_grad for p in model.merge_and_unload().parameters())
