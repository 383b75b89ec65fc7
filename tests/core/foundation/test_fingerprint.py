"""The fingerprint of a base's config: how the base is run does not count, what an adapter depends on does."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, T5Config

from slimtune.core.foundation.fingerprint import FACTS, config_fingerprint

SIZE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZE).to_dict()
RUN = {
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "torch_dtype": st.sampled_from(["float32", None]),
    "transformers_version": st.text(max_size=6),
    "_attn_implementation": st.sampled_from(["sdpa", "eager"]),
    "use_cache": st.booleans(),
    "_name_or_path": st.text(max_size=9),
    "architectures": st.permutations(["LlamaForCausalLM", "LlamaModel"]),
    "quantization_config": st.sampled_from([None, {"quant_method": "gguf"}, {"load_in_4bit": True}]),
    "pad_token_id": st.integers(0, 9),
    "attention_dropout": st.floats(0, 1),
    "max_position_embeddings": st.integers(1, 99999),
    "a_setting_of_a_later_version": st.integers(),
}


@given(st.fixed_dictionaries({}, optional=RUN), st.randoms())
def test_how_the_base_is_run_does_not_count(run: dict[str, Any], random: Any) -> None:
    items = list({**LLAMA, **run}.items())
    random.shuffle(items)
    assert config_fingerprint(dict(items)) == config_fingerprint(LLAMA)


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_counts_under_each_of_its_names(fact: str) -> None:
    names = FACTS[fact].split()
    known = next((n for n in names if LLAMA.get(n) is not None), names[0])
    assert config_fingerprint({**LLAMA, known: 1001}) != config_fingerprint(LLAMA)
    assert len({config_fingerprint({name: 7}) for name in names}) == 1


def test_fingerprint_is_stable() -> None:
    # A change here makes every adapter saved before look like one for another base.
    assert config_fingerprint(LLAMA) == config_fingerprint(LlamaConfig(**SIZE)) == "6003cfcd3edd7cb4"


def test_transformers_4_and_5_spell_one_rope() -> None:
    new = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert config_fingerprint({"rope_theta": 500000, "rope_scaling": None}) == config_fingerprint(new)
    old = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 10000, "rope_type": "linear", "factor": 2}}
    assert config_fingerprint(old) == config_fingerprint(new)
    assert config_fingerprint(new) != config_fingerprint({"rope_parameters": {**new["rope_parameters"], "factor": 4}})
    layered = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    other = {"rope_parameters": {"full_attention": {"rope_theta": 1e5}, "sliding_attention": {"rope_theta": 1e4}}}
    assert config_fingerprint(layered) != config_fingerprint(other)


def test_what_is_spelled_out_equals_the_default() -> None:
    bare = {"hidden_size": 64, "num_attention_heads": 4}
    assert config_fingerprint({**bare, "num_key_value_heads": 4, "head_dim": 16}) == config_fingerprint(bare)
    assert config_fingerprint({**bare, "num_key_value_heads": 2}) != config_fingerprint(bare)


def test_nested_text_config_counts() -> None:
    one, other, same = ({"text_config": {**LLAMA, **c}} for c in ({}, {"vocab_size": 301}, {"use_cache": None}))
    assert config_fingerprint(one) == config_fingerprint(same) != config_fingerprint(other)


@pytest.mark.parametrize("config", [GPT2Config(n_embd=32, n_head=2), T5Config(d_model=32), LlamaConfig(**SIZE)])
def test_real_configs_survive_dtype_and_a_reload(config: Any, tmp_path: Any) -> None:
    before = config_fingerprint(config)
    config.dtype = torch.bfloat16
    config.use_cache = False
    config.save_pretrained(tmp_path)
    assert config_fingerprint(type(config).from_pretrained(tmp_path)) == before
