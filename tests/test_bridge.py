"""Ours pass for peft's, and what those libraries do for objects that are not ours stays as it was."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers as tf
from accelerate.utils import is_peft_model
from models_zoo import llama, run, shake
from transformers.trainer_utils import _is_peft_model

import slimtune
from slimtune import LoraConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_ours_pass_for_pefts_and_for_the_base():
    model = get_peft_model(llama(), LoraConfig())
    assert isinstance(model, slimtune.PeftModel)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, tf.LlamaForCausalLM)
    assert is_peft_model(model)
    assert _is_peft_model(model)
    assert isinstance(model.peft_config["default"], peft.PeftConfig)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_base_model() is model
    plain = model.unload()
    assert not isinstance(plain, peft.PeftModel | slimtune.PeftModel)
    assert not is_peft_model(plain)


def test_nothing_of_ours_comes_from_peft():
    model = get_peft_model(llama(), LoraConfig())
    ours = {n for c in type(model).__mro__ if c.__module__.startswith("slimtune") for n in vars(c)}
    for name in ours - {"__init_subclass__", "__module__", "__doc__"}:
        home = next(c for c in type(model).__mro__ if name in vars(c))
        assert not home.__module__.startswith("peft"), name


def test_pefts_own_models_are_as_they_were():
    get_peft_model(llama(), LoraConfig())
    theirs = peft.get_peft_model(llama(), peft.LoraConfig())
    assert type(theirs) is peft.PeftModel
    assert not isinstance(theirs, slimtune.PeftModel)
    causal = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert type(causal) is peft.PeftModelForCausalLM
    assert torch.equal(run(copy.deepcopy(causal).eval()), run(llama()))
    assert not isinstance(peft.LoraConfig(), slimtune.PeftConfig)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_peft_hands_our_config_over(task):
    model = peft.get_peft_model(llama(), LoraConfig(r=4, task_type=task), adapter_name="mine")
    assert isinstance(model, slimtune.PeftModel)
    assert model.active_adapter == "mine"
    again = peft.PeftModel(llama(), LoraConfig(r=4))
    assert isinstance(again, slimtune.PeftModel)


def test_the_class_itself_attaches():
    model = slimtune.PeftModel(llama(), LoraConfig(r=2), "mine")
    assert isinstance(model, slimtune.PeftModel)
    assert list(model.peft_config) == ["mine"]


FIRST = """
import peft, torch
from models_zoo import llama
from slimtune.methods.lora import LoraConfig

model = peft.get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))  # no model of ours was made before
import slimtune
assert isinstance(model, slimtune.PeftModel), type(model).__mro__
"""


def test_the_hand_over_stands_from_the_first_config_on(pytestconfig):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST],
        cwd=pytestconfig.rootpath / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_label_smoothing_knows_a_causal_model(tmp_path):
    """The Trainer reads the model's name through `base_model.model`, and shifts the labels by it."""
    ids = torch.arange(3, 12)[None]

    def loss(wrap):
        model = wrap(llama(dtype=torch.float32))
        args = tf.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
        return tf.Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}).item()

    plain = loss(lambda m: m)
    assert loss(lambda m: get_peft_model(m, LoraConfig())) == plain
    assert loss(lambda m: peft.get_peft_model(m, peft.LoraConfig())) == plain


def test_a_copy_of_a_config_is_its_own():
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2})
    twin = copy.deepcopy(config)
    assert twin == config
    twin.rank_pattern["q_proj"] = 9
    assert config.rank_pattern == {"q_proj": 2}
    sent = pickle.loads(pickle.dumps(config))  # to another process
    assert sent == config
    assert isinstance(sent, peft.PeftConfig)


def test_both_can_hold_the_same_base_one_after_the_other():
    base = llama()
    ours = get_peft_model(base, LoraConfig())
    shake(ours)
    ours.unload()
    theirs = peft.get_peft_model(base, peft.LoraConfig())
    assert torch.equal(run(theirs.eval()), run(llama()))
