"""`layer_replication`: layers that share the base's weights, with adapters of their own."""

import pytest
import torch
from adapter_checks import assert_loads
from models_zoo import gemma3, gpt2, llama, run, shake, tokens

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.errors import ConfigError, TargetError, UsageError
from slimtune.export.export_support import get_export_support_flags

RANGES = [[0, 1], [0, 2], [1, 2]]
SETTINGS = {"target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, "r": 2}


def test_files_work_in_both_libraries(tmp_path):
    ours = shake(get_peft_model(llama(), LoraConfig(**SETTINGS)))
    assert_loads(ours, llama, tmp_path / "ours")
    assert len(slimtune.get_peft_model_state_dict(ours)) == 4 * 2 * 2


@pytest.mark.parametrize("base", [llama, gemma3, gpt2])
def test_generation_with_a_cache_equals_whole_sequences(base):
    settings = SETTINGS | ({"target_modules": ["c_attn"]} if base is gpt2 else {})
    model = shake(get_peft_model(base(), LoraConfig(**settings)).eval())
    ids = tokens()[:1]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for place in range(ids.shape[1], found.shape[1]):
        assert model(found[:, :place]).logits[0, -1].argmax() == found[0, place]


def test_the_base_comes_back():
    base, expected = llama(), run(llama())
    layers = list(base.model.layers)
    model = get_peft_model(base, LoraConfig(**SETTINGS))
    assert model.model.layers[1].mlp.down_proj.weight is layers[0].mlp.down_proj.weight
    base = model.unload()
    assert [*base.model.layers] == layers
    assert torch.equal(run(base), expected)
    assert base.config.num_hidden_layers == 2
    with pytest.raises(TargetError):
        get_peft_model(base, LoraConfig(**{**SETTINGS, "target_modules": ["nothing"]}))
    assert torch.equal(run(base), expected)


def test_what_cannot_be_done_is_refused():
    model = get_peft_model(llama(), LoraConfig(**SETTINGS))
    model.add_adapter("second", LoraConfig(**SETTINGS))
    with pytest.raises(UsageError, match="layer_replication"):
        model.add_adapter("third", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MergeUnsupported, match="layer_replication"):
        model.merge_adapter()
    assert not any(vars(get_export_support_flags(model)).values())
    with pytest.raises(TargetError, match=r"layer_replication.*\b3\b"):
        get_peft_model(llama(), LoraConfig(layer_replication=[[0, 3]]))
    with pytest.raises(ConfigError, match="pairs"):
        LoraConfig(layer_replication=[[2, 1]])
