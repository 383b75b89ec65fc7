from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, T5Config

from slimtune.utils.fingerprint import FACTS, base_facts, config_fingerprint

SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
LLAMA = LlamaConfig(**SIZE).to_dict()

# how a base is run or stored, never which base it is
RUN = {
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "torch_dtype": st.sampled_from(["float32", None]),
    "transformers_version": st.text(max_size=6),
    "_attn_implementation": st.sampled_from(["sdpa", "eager"]),
    "attn_implementation": st.sampled_from(["sdpa", "eager"]),
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


@given(st.sampled_from(sorted(FACTS)), st.integers(1001, 10**6))
def test_every_fact_counts(fact: str, value: int) -> None:
    changed = dict(LLAMA)
    names = FACTS[fact].split()
    changed[next((n for n in names if changed.get(n) is not None), names[0])] = value
    assert config_fingerprint(changed) != config_fingerprint(LLAMA)


@given(st.sampled_from(sorted(FACTS)), st.data())
def test_a_fact_has_one_value_whatever_it_is_called(fact: str, data: st.DataObject) -> None:
    first, second = (data.draw(st.sampled_from(FACTS[fact].split())) for _ in range(2))
    assert config_fingerprint({first: 7}) == config_fingerprint({second: 7})


def test_it_is_stable() -> None:
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


def test_a_nested_text_config_counts() -> None:
    assert config_fingerprint({"text_config": LLAMA}) != config_fingerprint(
        {"text_config": {**LLAMA, "vocab_size": 301}}
    )
    assert config_fingerprint({"text_config": LLAMA}) == config_fingerprint(
        {"text_config": {**LLAMA, "use_cache": None}}
    )


@pytest.mark.parametrize("config", [GPT2Config(n_embd=32, n_head=2), T5Config(d_model=32), LlamaConfig(**SIZE)])
def test_real_configs_survive_dtype_and_a_reload(config: Any, tmp_path: Any) -> None:
    before = config_fingerprint(config)
    assert len(before) == 16
    assert int(before, 16) >= 0
    config.dtype = torch.bfloat16
    config.use_cache = False
    config.save_pretrained(tmp_path)
    assert config_fingerprint(type(config).from_pretrained(tmp_path)) == before
    assert {"model_type", "hidden", "layers", "heads", "vocab"} <= set(base_facts(config.to_dict()))
