"""Weaker intruder dimensions: the same update as peft's at linear layers."""

import peft
import pytest
import torch
from models_zoo import llama, shake
from peft.tuners.lora.intruders import reduce_intruder_dimension as pefts_reduce

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.errors import ConfigError
from slimtune.methods.lora.intruders import reduce_intruder_dimension


def updates(home, reduce):
    model = shake(home.get_peft_model(llama(dtype=torch.float32), home.LoraConfig(r=4, target_modules=["q_proj"])))
    lines = []
    reduce(model, threshold_epsilon=0.7, logging_sink=lines.append)
    assert model.active_adapters == ["intruder_reduced"]
    assert any("Intruders: " in line for line in lines)
    return home.get_peft_model_state_dict(model, adapter_name="intruder_reduced")


def test_updates_equal_pefts():
    mine, theirs = (updates(*each) for each in ((slimtune, reduce_intruder_dimension), (peft, pefts_reduce)))
    for key in (k for k in mine if "lora_A" in k):
        ours, other = (t[key.replace("lora_A", "lora_B")] @ t[key] for t in (mine, theirs))
        assert (ours - other).abs().max() < 1e-5


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_without_reduction_the_update_stays(targets):
    model = shake(get_peft_model(llama(dtype=torch.float32), LoraConfig(r=4, target_modules=targets)))
    reduce_intruder_dimension(model, threshold_epsilon=2, mitigation_lambda=1, logging_sink=None)
    for old, new in zip(*(model.adapter_modules(n).values() for n in ("default", "intruder_reduced")), strict=True):
        (A, B, s), (new_A, new_B, _) = old.low_rank_factors(), new.low_rank_factors()
        assert (s * (B @ A - new_B @ new_A)).abs().max() < 1e-5
        assert (A - new_A).abs().max() > 1e-3


def test_other_methods_are_refused():
    with pytest.raises(ConfigError, match=r"'default' .*q_proj"):
        reduce_intruder_dimension(get_peft_model(llama(), LoraConfig(use_dora=True)))
