"""Our models and configs pass for PEFT's, and PEFT's own stay as they are."""

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


def test_models_pass_for_peft_and_for_the_base():
    model = get_peft_model(llama(), LoraConfig())
    assert isinstance(model, slimtune.PeftModel)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, tf.LlamaForCausalLM)
    assert is_peft_model(model)
    assert _is_peft_model(model)
    assert isinstance(model.peft_config["default"], peft.PeftConfig)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_base_model() is model
    ours = {n for c in type(model).__mro__ if c.__module__.startswith("slimtune") for n in vars(c)}
    for name in ours - {"__init_subclass__", "__module__", "__doc__"}:  # none of our names comes from PEFT
        home = next(c for c in type(model).__mro__ if name in vars(c))
        assert not home.__module__.startswith("peft"), name
    shake(model)
    plain = model.unload()
    assert not is_peft_model(plain)
    assert not isinstance(plain, peft.PeftModel | slimtune.PeftModel)
    assert torch.equal(run(peft.get_peft_model(plain, peft.LoraConfig()).eval()), run(llama()))


@pytest.mark.parametrize(("task", "cls"), [(None, peft.PeftModel), ("CAUSAL_LM", peft.PeftModelForCausalLM)])
def test_peft_models_stay_peft_models(task, cls):
    get_peft_model(llama(), LoraConfig())
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(task_type=task))
    assert type(theirs) is cls
    assert torch.equal(run(copy.deepcopy(theirs).eval()), run(llama()))
    assert not isinstance(peft.LoraConfig(), slimtune.PeftConfig)


@pytest.mark.parametrize("attach", [peft.get_peft_model, peft.PeftModel, slimtune.PeftModel])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_our_config_makes_our_model(attach, task):
    model = attach(llama(), LoraConfig(r=4, task_type=task), adapter_name="mine")
    assert isinstance(model, slimtune.PeftModel)
    assert model.active_adapter == "mine"


FIRST = """
import peft
from models_zoo import llama
from slimtune.methods.lora import LoraConfig

model = peft.get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))  # slimtune's model module is not imported
import slimtune
assert isinstance(model, slimtune.PeftModel), type(model).__mro__
"""


@pytest.mark.slow
def test_first_config_in_a_new_process(pytestconfig):
    command = [sys.executable, "-W", "ignore", "-c", FIRST]
    done = subprocess.run(command, cwd=pytestconfig.rootpath / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_trainer_smooths_labels_as_for_the_base(tmp_path):
    """The Trainer reads the model's name through `base_model.model`, and shifts the labels by it."""
    ids = torch.arange(3, 12)[None]

    def compute_loss(adapt):
        model = adapt(llama(dtype=torch.float32))
        args = tf.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
        return tf.Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}).item()

    assert compute_loss(lambda m: get_peft_model(m, LoraConfig())) == compute_loss(lambda m: m)


def test_configs_are_copied_and_pickled():
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2})
    twin = copy.deepcopy(config)
    assert twin == config
    twin.rank_pattern["q_proj"] = 9
    assert config.rank_pattern == {"q_proj": 2}
    sent = pickle.loads(pickle.dumps(config))  # to another process
    assert sent == config
    assert isinstance(sent, peft.PeftConfig)
