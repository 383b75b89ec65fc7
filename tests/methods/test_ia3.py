"""(IA)³ beyond the contract: layers with a scaled input, PEFT's table, small changes on 16-bit bases."""

import pytest
import torch
from models_zoo import bert_encoder, llama, run

from slimtune import get_peft_model
from slimtune.errors import ConfigError, TargetError
from slimtune.methods.ia3 import SCALED, IA3Config, ScaledInput


def inputs_scaled(model):
    return {n.rsplit(".", 1)[-1] for n, d in model.adapter_modules("default").items() if isinstance(d, ScaledInput)}


def test_the_defaults_equal_pefts():
    constants = pytest.importorskip("peft.utils.constants")
    targets = IA3Config.architecture_targets
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert {k: sorted(v) for k, v in targets.items()} == {k: sorted(v) for k, v in theirs.items()}
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {k: v for k, (_, v) in SCALED.items()} == feedforward


@pytest.mark.parametrize("feedforward", [["down_proj", "up_proj"], r".*\.(down|up)_proj"])
def test_feedforward_modules_by_name_or_regex(feedforward):
    targets = ["k_proj", "down_proj", "up_proj"]
    model = get_peft_model(llama(), IA3Config(target_modules=targets, feedforward_modules=feedforward))
    assert inputs_scaled(model) == {"down_proj", "up_proj"}
    assert model.peft_config["default"].feedforward_modules == feedforward


def test_the_default_is_written_into_the_config():
    model = get_peft_model(llama(), IA3Config())
    assert model.peft_config["default"].feedforward_modules == ["down_proj"]
    assert inputs_scaled(model) == {"down_proj"}


def test_a_feedforward_module_must_be_a_target():
    with pytest.raises(TargetError, match=r"down_prj.*did you mean 'down_proj'"):
        get_peft_model(llama(), IA3Config(target_modules=r".*\.(k|down)_proj", feedforward_modules=["down_prj"]))


def test_the_default_may_match_no_target():
    assert inputs_scaled(get_peft_model(llama(), IA3Config(target_modules=["k_proj"]))) == set()


def test_feedforward_modules_are_required_without_default():
    model = bert_encoder()
    model.config.model_type = "unknown"
    with pytest.raises(ConfigError, match="unknown"):
        get_peft_model(model, IA3Config(target_modules=["key"]))
    get_peft_model(model, IA3Config(target_modules=["key"], feedforward_modules=[]))


def test_a_factor_near_one_is_not_rounded():
    """In bfloat16 1.002 is 1: all that was learned would be lost."""
    model = get_peft_model(llama(dtype=torch.bfloat16), IA3Config()).eval()
    start = run(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(1.002)
    assert not torch.equal(run(model), start)
