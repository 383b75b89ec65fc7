"""EVA against peft: the same batches give the same ranks and directions."""

import peft
import pytest
import torch
from models_zoo import llama, run, shake, tokens

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from slimtune.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
BATCHES = [{"input_ids": tokens(8, 32, seed=s), "attention_mask": torch.ones(8, 32).long()} for s in range(3)]
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "eva"}


def base():
    return llama(dtype=torch.float32)


def adapted(**eva):
    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(**SETTINGS, eva_config=slimtune.EvaConfig(**eva)))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_and_directions_equal_pefts(rho):
    ours = adapted(rho=rho)
    initialize_lora_eva_weights(ours, BATCHES)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**SETTINGS, eva_config=peft.EvaConfig(rho=rho)))
    peft.initialize_lora_eva_weights(theirs, BATCHES, show_progress_bar=False)
    a, b = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].alpha_pattern == theirs.peft_config["default"].alpha_pattern


def test_starts_unchanged_trains_and_is_saved(tmp_path):
    model = adapted()
    initialize_lora_eva_weights(model, BATCHES)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model.eval()), run(base()))
    assert any(p.requires_grad for p in model.parameters())
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path)), run(model))


def test_small_batches_and_other_adapters_are_refused():
    with pytest.raises(UsageError, match="8 positions"):
        initialize_lora_eva_weights(adapted(), [{"input_ids": tokens(1, 3)}])
    with pytest.raises(UsageError, match="EVA"):
        initialize_lora_eva_weights(get_peft_model(base(), LoraConfig()), BATCHES)
