"""Adapters that were loaded, attached or saved wrongly without a word."""

import models_zoo as zoo
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import slimtune
from slimtune.errors import AdapterError, TargetError, UsageError

LORA = {"r": 4, "target_modules": ["q_proj"]}


def save(folder):
    model = slimtune.get_peft_model(zoo.llama(), slimtune.LoraConfig(**LORA))
    model.save_pretrained(folder)
    return model, folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to(torch.int8), "another kind of numbers.*int8"),
        (lambda t: t.bool(), "another kind of numbers.*bool"),
        (lambda t: t.to(torch.complex64), "another kind of numbers.*complex64"),
        (lambda t: t / 0, "contain NaN or Inf"),
    ],
)
def test_tensors_that_are_no_finite_floats(change, words, tmp_path):
    _, file = save(tmp_path)
    save_file({k: change(t) for k, t in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=words):
        slimtune.PeftModel.from_pretrained(zoo.llama(), tmp_path)


def test_equal_adapters_have_equal_bytes(tmp_path):
    model, file = save(tmp_path)
    contents = {file.read_bytes() for _ in range(12) if not model.save_pretrained(tmp_path)}
    assert len(contents) == 1


@pytest.mark.parametrize("name", ["/tmp/x", "a/b", "a\\b", "a\n", "x" * 300])
def test_names_that_lead_elsewhere(name, tmp_path):
    model, _ = save(tmp_path)
    with pytest.raises(UsageError, match="cannot be the name of a new adapter"):
        model.add_adapter(name, slimtune.LoraConfig(**LORA))


@pytest.mark.parametrize("dora", [False, True])
def test_falcon_changes_an_output_in_place(dora):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": zoo.VOCAB}
    model = tf.FalconForCausalLM(tf.FalconConfig(**sizes))
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, target_modules="all-linear", use_dora=dora))
    model.train()(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters("default"))


def test_mamba_out_proj_is_refused():
    model = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=zoo.VOCAB, state_size=8))
    with pytest.raises(TargetError, match="out_proj"):
        slimtune.get_peft_model(model, slimtune.LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoTokenizer"])
def test_auto_mapping_names_no_model(name, tmp_path):
    config = slimtune.LoraConfig(**LORA, auto_mapping={"base_model_class": name, "parent_library": "transformers"})
    config.base_model_name_or_path = "x"
    with pytest.raises(AdapterError, match="neither a task nor a class"):
        slimtune.AutoPeftModel.from_pretrained(tmp_path, config=config)
