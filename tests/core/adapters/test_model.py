"""PeftModel: tied heads, trained copies, biases, merging, generation, and calls in an odd order."""

import re
import threading
import warnings
from contextlib import nullcontext

import models_zoo as zoo
import peft
import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from adapter_checks import assert_merges, unchanged
from error_facts import has_code
from models_zoo import gpt2, llama, run, same_base, shake, snapshot, tokens
from several_adapters import add_adapters
from torch import nn

from slimtune import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    find_modules_without_gradient,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.errors import PeftWarning, TargetError, UnsupportedTargetError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QV = {"target_modules": ["q_proj", "v_proj"]}


def adapt(base, **settings):
    return add_adapters(base, {"default": settings})


# --- tied heads, trained copies, biases ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_tied_head_merges_apart_from_the_embedding(settings, tmp_path):
    model = adapt(llama(tie=True), **settings)
    expected, before = run(model), snapshot(llama(tie=True))
    assert same_base(model, before)
    changed = {*settings["target_modules"], *settings.get("modules_to_save", [])}
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9
    for name, weight in (("embed_tokens", model.model.embed_tokens.weight), ("lm_head", model.lm_head.weight)):
        assert torch.equal(weight, before["model.embed_tokens.weight"]) != (name in changed)
    model.unmerge_adapter()
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert torch.equal(run(model), expected)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (run(loaded) - expected).abs().max() < 1e-9


def test_unchanged_head_stays_tied():
    for plain in (
        adapt(llama(tie=True), target_modules=["q_proj"]).merge_and_unload(),
        adapt(llama(tie=True), target_modules=["lm_head"], modules_to_save=["embed_tokens"]).unload(),
    ):
        assert plain.config.tie_word_embeddings is True
        assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_split_head_of_a_frozen_base_stays_frozen():
    model = adapt(llama(tie=True).requires_grad_(False), target_modules=["lm_head"])
    assert not any(p.requires_grad for p in model.merge_and_unload().parameters())


def test_scaled_embedding_scales_the_change():
    settings = {"target_modules": ["embed_tokens"], "init_lora_weights": False}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(zoo.gemma3(), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    model = get_peft_model(zoo.gemma3(), LoraConfig(**settings)).eval()
    assert (run(model) - run(theirs)).abs().max() < 1e-9
    assert_merges(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(zoo.gemma3()))


CASES = [
    (zoo.bert_classifier, {"task_type": "SEQ_CLS"}),
    (zoo.roberta_classifier, {"task_type": "SEQ_CLS"}),
    (zoo.bert_tagger, {"task_type": "TOKEN_CLS"}),
    (gpt2, {"bias": "lora_only"}),
    (zoo.bert_classifier, {"bias": "all"}),
]


@pytest.mark.parametrize(("make", "settings"), CASES)
def test_trained_heads_and_biases(make, settings):
    model = adapt(make(), **settings)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings))
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    expected, before = run(model), snapshot(make())
    with model.disable_adapter():
        assert torch.equal(run(model), run(make()))
    assert_merges(model)
    assert same_base(model, before)
    plain = model.merge_and_unload()
    assert set(plain.state_dict()) == set(make().state_dict())
    assert (run(plain) - expected).abs().max() < 1e-9


def test_trained_biases_load_into_an_adapter_without_them(tmp_path):
    source = adapt(gpt2(), bias="all")
    model = get_peft_model(gpt2(), LoraConfig()).eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    assert torch.equal(run(model), run(source))
    with model.disable_adapter():
        assert torch.equal(run(model), run(gpt2().eval()))
    source.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"\b2 adapters"):
        source.add_adapter("second", LoraConfig(bias="all"))
    source.load_adapter(tmp_path, "second", is_trainable=True)
    assert all(p.requires_grad for p in source.trainable_parameters("second"))


def test_adapters_of_a_layer_stay_after_a_merge_that_fails():
    model = add_adapters(gpt2(), {"one": {"lora_bias": True, "use_rslora": True}, "two": {}})
    for layer in model.adapted_layers().values():
        layer.set_adapter(["one", "two"])
    assert_merges(model)
    model.adapter_modules("one")["transformer.h.1.attn.c_attn"].lora_B.bias.data.fill_(torch.inf)
    with pytest.raises(MergeUnsupported):
        model.merge_adapter(safe_merge=True)
    assert same_base(model, snapshot(gpt2()))


def test_two_adapters_cannot_copy_one_module():
    settings = {**QV, "modules_to_save": ["lm_head"]}
    model = add_adapters(llama(), {"default": settings, "second": settings})
    for act in (model.set_adapter, model.merge_adapter):
        with pytest.raises(UsageError, match="lm_head"):
            act(["default", "second"])
    assert model.active_adapters == ["second"]


@pytest.mark.parametrize("make", [llama, gpt2, zoo.t5, zoo.bert_encoder])
def test_printed_parameters_equal_peft(make, capsys):
    get_peft_model(make(), LoraConfig(r=4)).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(make(), peft.LoraConfig(r=4)).print_trainable_parameters()
    assert ours == capsys.readouterr().out


# --- merging and disabling -------------------------------------------------------------------------------------------


def test_safe_merge_refuses_nan():
    model = adapt(llama(), **QV)
    next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(MergeUnsupported, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert same_base(model, snapshot(llama()))


def test_merged_model_keeps_its_own_copies():
    model = adapt(llama(tie=True), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.merge_adapter()
    head = model.lm_head
    assert head._parameters["weight"].data_ptr() != head.trained_copies["default"].weight.data_ptr()
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        model.to_lora("default", 2)
    model.float()  # also what the merge replaced
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_base(model, snapshot(llama(tie=True).float()))


def test_adapters_start_from_the_base():
    """An adapter that reads the weights (DoRA) or copies them sees the base's, whatever is active or merged."""
    model = adapt(llama(), **QV, modules_to_save=["lm_head"])
    model.add_adapter("dora", LoraConfig(target_modules=["lm_head", "q_proj"], use_dora=True))
    model.merge_adapter()
    merged = run(model)
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"], use_dora=True))
    model.add_adapter("head", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    model.unmerge_adapter()
    for name in ("dora", "late", "head"):
        model.set_adapter(name)
        assert torch.equal(run(model), run(llama())), name
    model.set_adapter("default")
    assert (run(model) - merged).abs().max() < 1e-9


def test_disabled_model_refuses_changes():
    model = add_adapters(llama(), {"a": QV, "b": QV})
    with model.disable_adapter():
        for act in (model.unload, model.merge_adapter, lambda: model.delete_adapter("b")):
            with pytest.raises(UsageError, match="disable_adapter"):
                act()
    assert torch.equal(run(model.unload()), run(llama()))


# --- adding and running ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "items", "", "a.b", "__base__", "/tmp/x", "a/b", "a\\b", "a\n", "x" * 300])
def test_invalid_adapter_name_leaves_no_trace(name):
    model = llama()
    with unchanged(model), pytest.raises(UsageError, match=re.escape(repr(name))):
        get_peft_model(model, LoraConfig(**QV), name)


def test_failed_attachment_leaves_no_trace():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    get_peft_model(model, LoraConfig(target_modules=["2"]))
    model[1].forward = lambda x: x
    with pytest.raises(TargetError, match=r"forward.*Linear"):
        model.add_adapter("second", LoraConfig(target_modules=["0", "1"]))
    assert list(model.peft_config) == ["default"]
    assert not any("second" in n for n, _ in model.named_parameters())
    assert type(model[0]) is nn.Linear


def test_training_while_merged_is_told():
    model, ids = adapt(llama()).train(), tokens()
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="merged"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(ids)
        model.unmerge_adapter()
        model.train()(ids).logits.sum().backward()


def test_wrong_calls_are_refused():
    model = shake(get_peft_model(llama(), LoraConfig()))
    for act, message in [
        (lambda: get_peft_model(model, LoraConfig()), "already has adapters: 'default'"),
        (lambda: get_peft_model(None, LoraConfig()), "the base is a NoneType"),
        (lambda: get_peft_model(llama(), PeftConfig()), "is not the config of a method"),
        (lambda: model.set_adapter([]), "no adapter is given"),
    ]:
        with pytest.raises(UsageError, match=message):
            act()


def test_second_get_peft_model_adds_an_adapter_or_replaces_one_without_effect():
    model = llama()
    for name, targets in (("default", ["q_proj"]), ("default", ["v_proj"]), ("other", ["k_proj"])):
        with nullcontext() if targets == ["q_proj"] else pytest.warns(match="adapters"):
            assert get_peft_model(model, LoraConfig(target_modules=targets), name) is model
    assert {n: c.target_modules for n, c in model.peft_config.items()} == {"default": {"v_proj"}, "other": {"k_proj"}}
    assert model.active_adapters == ["other"]


def test_adapter_named_twice_runs_once():
    model = adapt(llama(), **QV)
    once = run(model)
    model.set_adapter(["default", "default"])
    assert torch.equal(run(model), once)


def test_generate_uses_the_adapter():
    model = adapt(llama(), target_modules="all-linear")
    ids, how = torch.tensor([[1, 5, 9]]), {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, use_cache=False))
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **how), llama().generate(ids, **how))


def test_prefix_in_several_threads():
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    expected, different = run(model), []

    def work():
        different.extend(1 for _ in range(30) if not torch.equal(run(model), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not different
    assert torch.equal(run(model.unload()), run(llama()))


def test_forward_kept_by_a_wrapper_runs_after_unload():
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    model = get_peft_model(llama().model, config)
    forward = model.forward
    model.unload()
    assert torch.equal(forward(input_ids=tokens()).last_hidden_state, run(llama().model))


# --- under other libraries: hooks, replicas, checkpointing ------------------------------------------------------------


RANDOM = {"r": 4, "init_lora_weights": False}


def attach_random(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**RANDOM)).eval()


def enable_checkpointing(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


@pytest.mark.parametrize("hooks", ["before", "after"])
def test_accelerate_hooks(hooks):
    plain, expected = run(llama()), run(attach_random(llama()))
    if hooks == "before":
        model = attach_random(dispatch_model(llama(), {"": "cpu"}, force_hooks=True))
    else:
        model = dispatch_model(attach_random(llama()), {"": "cpu"}, force_hooks=True)
    assert torch.equal(run(model), expected)
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
    A, B, scale = layer.adapters["default"].low_rank_factors()
    assert torch.allclose(replica(x), x @ weight.t() + scale * x @ A.t() @ B.t())
    assert not torch.equal(layer.weight, weight)


def test_fsdp1_is_refused():
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))[0]
    with pytest.raises(UnsupportedTargetError, match="fully_shard"):
        del layer.weight  # as FSDP1 does before it sets a view of its flat parameter in its place
    assert layer.weight.shape == (4, 4)


def test_unload_removes_the_gradient_hook():
    base = enable_checkpointing(llama())
    hooks = base.get_input_embeddings()._forward_hooks
    before = len(hooks)
    model = attach_random(base)
    assert len(hooks) > before or before
    model.unload()
    assert len(hooks) <= before


def test_plain_module_around_a_checkpointed_model():
    outer = nn.ModuleDict({"inner": enable_checkpointing(llama())})
    assert get_peft_model(outer, LoraConfig(target_modules=["q_proj"])).match_report().adapted


@pytest.mark.parametrize("dora", [False, True])
def test_falcon_changes_an_output_in_place(dora):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": zoo.VOCAB}
    model = tf.FalconForCausalLM(tf.FalconConfig(**sizes))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=dora))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters("default"))


def test_modules_that_the_model_does_not_call():
    model = get_peft_model(zoo.t5(), LoraConfig(target_modules=["shared", "q"]))
    model(tokens(), labels=tokens()).loss.backward()
    assert find_modules_without_gradient(model) == ["shared"]


@pytest.mark.parametrize("make", [zoo.t5, zoo.bart])
@pytest.mark.parametrize("targets", [["shared"], ["embed_tokens"], ["lm_head"]], ids=str)
def test_merge_into_several_tied_tensors_survives_saving(make, targets, tmp_path):
    model = adapt(make(), target_modules=targets)
    expected = run(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert (run(type(make()).from_pretrained(tmp_path, dtype=torch.float64)) - expected).abs().max() < 1e-10
