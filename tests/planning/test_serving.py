"""What serving takes, against published GGUF files and what llama.cpp and vLLM report."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from slimtune.errors import ModelError, UsageError
from slimtune.models.registry import load_known_configs
from slimtune.planning.gpus import find_gpu, gpu_with_memory
from slimtune.planning.serving import ENGINES, GGUF_BITS, METADATA, VLLM_BITS, cache_bytes, plan_serving, weight_bytes
from slimtune.setup import build_meta_model

MIB, GIB = 1 << 20, 1 << 30

PUBLISHED: dict[str, dict[str, int]] = {
    # Bytes of files made without an importance matrix, or whose types it does not change.
    "llama-3.1-8b": {  # bartowski/Meta-Llama-3.1-8B-Instruct-GGUF
        "IQ3_M": 3784828320, "Q2_K": 3179136416, "Q3_K_L": 4321961376, "Q3_K_M": 4018922912, "Q3_K_S": 3664504224,
        "Q4_K_S": 4692673952, "Q4_K_M": 4920739232, "Q5_K_S": 5599298976, "Q5_K_M": 5732992416, "Q6_K": 6596011424,
        "Q8_0": 8540775840, "F32": 32128885888, "IQ4_XS": 4447667616, "IQ4_NL": 4677993888,
    },
    "llama-3.1-70b": {"Q2_K": 26375113632, "Q3_K_M": 34267499424, "Q4_K_M": 42520398752, "Q5_K_S": 48657451936},
    "llama-3.2-1b": {"Q3_K_L": 732524672, "Q4_K_M": 807694464, "Q6_K": 1021800576, "Q8_0": 1321083008,
                     "F16": 2479595360},
    "llama-3.2-3b": {"Q2_K": 1363935680, "Q4_K_M": 2019377600, "Q8_0": 3421898816, "BF16": 6433687744},
    "llama-2-7b": {"Q4_K_M": 4081004224, "Q5_K_M": 4783156928, "Q8_0": 7161089728},
    "qwen2.5-7b": {"Q2_K": 3015940032, "Q3_K_M": 3808391104, "Q4_0": 4431390720, "Q4_K_M": 4683073536,
                   "Q5_0": 5315176576, "Q5_K_M": 5444831232, "Q6_K": 6254198784, "Q8_0": 8098525184,
                   "F16": 15237853184},
    "qwen2.5-14b": {"Q3_K_M": 7339204160, "Q4_K_M": 8988110496, "Q8_0": 15701597984},
    "qwen2.5-32b": {"Q2_K": 12313098432, "Q4_K_M": 19851335872},
    "qwen3-8b": {"Q4_K_M": 5027783488, "Q5_0": 5720761152, "Q5_K_M": 5851112224, "Q6_K": 6725899040,
                 "Q8_0": 8709518112},
    "qwen3-4b": {"Q4_K_M": 2497280256, "Q5_K_M": 2889513184, "Q6_K": 3306260704, "Q8_0": 4280404704},
    "qwen3-0.6b": {"Q2_K": 296238784, "Q4_K_M": 396705472, "Q8_0": 639447744, "BF16": 1198182848},
    "mistral-7b-v0.3": {"Q2_K": 2722877600, "Q3_K_M": 3522941088, "Q4_K_M": 4372811936, "Q5_K_M": 5136175264,
                        "Q6_K": 5947248800, "Q8_0": 7702565024},
    "mistral-nemo-12b": {"Q4_K_M": 7477208192, "Q8_0": 13022372992},
    "mistral-small-24b": {"Q4_K_M": 14333908672, "Q6_K": 19345938112},
    "gemma-2-2b": {"Q3_K_L": 1550436192, "Q4_K_S": 1638651744, "Q4_K_M": 1708582752, "Q6_K": 2151393120,
                   "Q8_0": 2784495456},
    "gemma-3-270m": {"Q2_K": 237079584, "Q4_K_M": 253115424, "Q5_K_M": 260027424, "Q8_0": 291546144, "F16": 542835488},
    "phi-4-mini": {"Q4_K_M": 2491874688, "Q8_0": 4084611456},
    "phi-4": {"Q4_K_M": 9053114816, "Q6_K": 12030251456, "Q8_0": 15580500416},
}  # fmt: skip


def base(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**load_known_configs()[name]["config"])


@cache
def model(name: str) -> Any:
    return build_meta_model(base(name), None, torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_have_their_published_size(name: str):
    for precision, size in PUBLISHED[name].items():
        made = weight_bytes(model(name), precision)[0] + METADATA * model(name).config.vocab_size
        assert made == pytest.approx(size, rel=0.03), precision


def test_a_file_of_experts():
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, intermediate_size=6144, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    experts = build_meta_model(config, None, torch.bfloat16)
    for precision, size in {"Q4_K_M": 18556686912, "Q2_K": 11258610240, "Q8_0": 32483932736}.items():
        assert weight_bytes(experts, precision)[0] == pytest.approx(size, rel=0.03)


def test_bits_are_those_of_the_mix():
    assert plan_serving(base("llama-3.1-8b")).bits == pytest.approx(4.89, abs=0.03)
    assert plan_serving(base("llama-3.1-8b"), precision="q8_0").bits == pytest.approx(8.5, abs=0.01)


@pytest.mark.parametrize("precision", GGUF_BITS)
def test_every_file_type_is_served(precision: str):
    served = plan_serving(base("qwen2.5-0.5b"), precision=precision)  # 896 wide: no multiple of 256
    assert 2 < served.bits < 32.1


def test_llama_cpp_reports_these_bytes():
    """load_tensors: CUDA0 4403.49 MiB, CPU_Mapped 281.81 MiB; KV 256.00 MiB of 2048 tokens; compute 258.50 MiB."""
    served = plan_serving(base("llama-3.1-8b"), engine="llama.cpp", context=2048, gpu=find_gpu("rtx-4090"))
    assert served.parts["weights"] / MIB == pytest.approx(4403.49, rel=0.01)
    assert served.host_bytes / MIB == pytest.approx(281.81, rel=0.01)
    assert served.parts["cache"] == 256 * MIB
    assert served.compute_bytes.low < 258.5 * MIB <= served.compute_bytes.high
    served = plan_serving(base("qwen2.5-7b"), engine="llama.cpp", context=4096, gpu=find_gpu("rtx-4090"))
    assert served.parts["weights"] / MIB == pytest.approx(4168.09, rel=0.01)
    assert served.host_bytes / MIB == pytest.approx(292.36, rel=0.01)
    assert served.parts["cache"] == 224 * MIB
    assert served.compute_bytes.low < 304 * MIB <= served.compute_bytes.high


def test_llama_cpp_keeps_the_window_and_a_batch():
    """Gemma 2 2B, 13 layers of each kind, 1024 numbers a token each of keys and values; its log: 416 MiB for 8192."""
    full, window = 2 * 416 * MIB, 13 * 2 * 1024 * 2 * (4096 + 512)
    assert cache_bytes(base("gemma-2-2b"), 16384, "llama.cpp") == full + window
    assert cache_bytes(base("gemma-2-2b"), 8192, "llama.cpp") == full // 2 + window
    short = cache_bytes(base("gemma-2-2b"), 1000, "llama.cpp")
    assert short == 2 * 13 * 2 * 1024 * 2 * 1024


def test_one_window_for_all_layers_is_kept_by_vllm_alone():
    mistral = base("mistral-7b-v0.1")
    assert cache_bytes(mistral, 32768, "llama.cpp") == 32768 * 131072
    assert cache_bytes(mistral, 32768, "vllm", "bf16", 2048) < 6400 * 131072


def test_vllm_reports_these_bytes():
    llama = plan_serving(base("llama-3.1-8b"), engine="vllm", context=37696)
    assert llama.parts["cache"] / GIB == pytest.approx(4.60, abs=0.005)
    assert llama.parts["weights"] / GIB == pytest.approx(14.99, rel=0.003)
    qwen = plan_serving(base("qwen2.5-7b"), engine="vllm", context=597776)
    assert qwen.parts["cache"] / GIB == pytest.approx(31.92, abs=0.02)
    assert qwen.parts["weights"] / GIB == pytest.approx(14.25, rel=0.005)


@pytest.mark.parametrize(
    ("name", "precision", "size"),
    [("qwen2.5-7b", "nf4", 5.43 * GIB), ("llama-3.1-8b", "fp8", 9.08e9), ("llama-3.1-8b", "int4", 5.73e9)],
)
def test_vllm_quantized(name: str, precision: str, size: float):
    assert plan_serving(base(name), engine="vllm", precision=precision).file_bytes == pytest.approx(size, rel=0.015)


def test_vllm_keeps_room_for_its_largest_rank_on_every_linear_layer():
    merged = plan_serving(base("llama-3.1-8b"), engine="vllm")
    beside = plan_serving(base("llama-3.1-8b"), engine="vllm", adapter_rank=12)
    assert merged.merged
    assert not beside.merged
    assert merged.parts["adapter"] == 0
    assert beside.parts["adapter"] == 80 * MIB  # 20.97e6 numbers a rank of 8 in 16 bits, twice
    with pytest.raises(UsageError, match="rank is 1000"):
        plan_serving(base("llama-3.1-8b"), engine="vllm", adapter_rank=1000)


def test_llama_cpp_loads_an_adapter_as_it_is():
    assert plan_serving(base("llama-3.1-8b"), adapter_rank=12).parts["adapter"] == 60 * MIB


def test_a_tied_table_lies_on_the_host_and_the_card():
    tied = plan_serving(base("qwen3-4b"), gpu=find_gpu("rtx-4090"))
    assert tied.host_bytes > 300e6
    assert tied.parts["weights"] == weight_bytes(model("qwen3-4b"), "Q4_K_M")[0]


def test_unified_memory_holds_all_of_it_once():
    served = plan_serving(base("llama-3.1-8b"), gpu=find_gpu("m4-24gb"))
    assert served.host_bytes == 0
    assert served.parts["weights"] == weight_bytes(model("llama-3.1-8b"), "Q4_K_M")[0]


def test_verdicts():
    assert plan_serving(base("llama-3.1-8b"), gpu=find_gpu("rtx-3060-12gb")).verdict == "fits"
    assert plan_serving(base("llama-3.1-70b"), gpu=find_gpu("rtx-4090")).verdict == "does not fit"
    served = plan_serving(base("llama-3.1-8b"))
    assert (served.verdict, served.usable_bytes, served.max_context) == (None, None, None)
    middle = sum(served.need) / 2
    assert plan_serving(base("llama-3.1-8b"), gpu=gpu_with_memory(f"{middle / GIB:.3f}GiB")).verdict == "tight"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_longest_context_fits_and_no_longer_one_does(engine: str):
    asked: dict[str, Any] = {"engine": engine, "gpu": find_gpu("l4"), "sequences": 4}
    longest = plan_serving(base("llama-3.1-8b"), **asked).max_context
    assert longest is not None
    assert longest % 256 == 0
    assert 0 < longest < 131072
    assert plan_serving(base("llama-3.1-8b"), **asked, context=longest).verdict == "fits"
    assert plan_serving(base("llama-3.1-8b"), **asked, context=longest + 256).verdict != "fits"


def test_a_model_too_large_has_no_context():
    assert plan_serving(base("llama-3.1-70b"), gpu=find_gpu("rtx-4090")).max_context == 0


def test_a_smaller_cache():
    sizes = [plan_serving(base("llama-3.1-8b"), cache=c).parts["cache"] for c in ("f16", "q8_0", "q4_0")]
    assert sizes == [512 * MIB, 272 * MIB, 144 * MIB]
    assert plan_serving(base("llama-3.1-8b"), engine="vllm", cache="fp8").parts["cache"] == 256 * MIB


def test_as_plain_values():
    served = plan_serving(base("llama-3.1-8b"), gpu=find_gpu("rtx-4090"))
    told = json.loads(json.dumps(served.to_dict()))
    assert told["need_bytes"] == {"low": served.need.low, "high": served.need.high}
    assert told["verdict"] == "fits"
    assert set(served.evidence) > set(served.parts)
    assert all(isinstance(n, int) for n in (*served.need, *served.compute_bytes, *told["usable_bytes"].values()))
    assert "RTX" in served.reason or "rtx-4090" in served.reason


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine": "lama.cpp"}, "llama.cpp"),
        ({"precision": "q4_km"}, "q4_k_m"),
        ({"engine": "vllm", "precision": "fp4"}, "fp8"),
        ({"cache": "q8_1"}, "q8_0"),
        ({"context": -1}, "context is -1"),
        ({"context": 0}, "context is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"adapter_rank": 0}, "rank is 0"),
    ],
)
def test_what_does_not_exist_is_said_with_what_does(asked: dict[str, Any], said: str):
    with pytest.raises(UsageError) as caught:
        plan_serving(base("llama-3.1-8b"), **asked)
    assert said in str(caught.value)


def test_other_states_than_keys_and_values_are_said():
    latent = base("llama-3.1-8b")
    latent.kv_lora_rank = 512
    with pytest.raises(ModelError, match="latent"):
        cache_bytes(latent, 1024, "vllm", "bf16")
    hybrid = base("qwen3-4b")
    hybrid.layer_types = ["linear_attention"] * 36
    with pytest.raises(ModelError, match="linear_attention"):
        cache_bytes(hybrid, 1024, "ollama")


def test_every_known_base_is_served():
    for name in load_known_configs():
        need = plan_serving(base(name)).need
        assert 0 < need.low < need.high, name


@pytest.mark.parametrize("precision", VLLM_BITS)
def test_every_vllm_precision(precision: str):
    assert 0.4e9 < plan_serving(base("qwen3-0.6b"), engine="vllm", precision=precision).file_bytes < 2.5e9
