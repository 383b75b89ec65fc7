"""What serving takes, against published files and what llama.cpp and vLLM report, and its speed against runs."""

import json
from functools import cache
from pathlib import Path

import published_serving as published
import pytest
import tiny_families
import torch
from transformers import AutoConfig

from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.base_config import load_base_config
from slimtune.errors import ModelError, UsageError
from slimtune.extras.known_models import load_known_models_by_alias
from slimtune.planning.gpu_specs import make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.meta_model import build_adapted_meta_model
from slimtune.planning.serving_cache import count_recurrent_state_bytes, count_request_kv_cache_bytes
from slimtune.planning.serving_memory import (
    METADATA,
    count_weight_and_embedding_bytes,
    count_weight_bytes_and_macs_per_token,
    describe_layer_structure,
    estimate_serving_memory,
)
from slimtune.planning.serving_speed import (
    DECODING,
    PREFILL,
    LayerStructure,
    describe_guessed_speeds,
    estimate_decode_and_prefill_speed,
    get_serving_fit_hardware_key,
    get_serving_fit_key,
)
from slimtune.planning.weight_formats import ENGINES, GGUF_TYPES, VLLM_BITS

MIB, GIB = 1 << 20, 1 << 30
PUBLISHED = {  # bytes of files made without an importance matrix, or whose types it does not change
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
    "step-3.7-flash": {"Q4_K_S": 111500000000},  # as its README rounds it
    "phi-4": {"Q4_K_M": 9053114816, "Q6_K": 12030251456, "Q8_0": 15580500416},
}  # fmt: skip


def config(name="llama-3.1-8b"):
    return AutoConfig.for_model(**load_known_models_by_alias()[name]["config"])


@cache
def model(name="llama-3.1-8b"):
    return build_adapted_meta_model(config(name), None, torch.bfloat16)


def plan(name="llama-3.1-8b", gpu=None, **settings):
    return estimate_serving_memory(config(name), gpu=require_gpu_by_name(gpu) if gpu else None, **settings)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_sizes(name):
    for precision, size in PUBLISHED[name].items():
        vocab_size = model(name).config.get_text_config().vocab_size
        planned = count_weight_and_embedding_bytes(model(name), precision)[0] + METADATA * vocab_size
        assert planned == pytest.approx(size, rel=0.03), precision


def test_published_file_sizes_of_experts():
    experts = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, intermediate_size=6144, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    built = build_adapted_meta_model(experts, None, torch.bfloat16)
    for precision, size in {"Q4_K_M": 18556686912, "Q2_K": 11258610240, "Q8_0": 32483932736}.items():
        assert count_weight_and_embedding_bytes(built, precision)[0] == pytest.approx(size, rel=0.03)


def test_bits_per_weight():
    assert plan().bits == pytest.approx(4.89, abs=0.03)
    assert plan(precision="q8_0").bits == pytest.approx(8.5, abs=0.01)
    for precision in GGUF_TYPES:  # 896 wide: no multiple of 256
        assert 2 < plan("qwen2.5-0.5b", precision=precision).bits < 32.1
    for precision in VLLM_BITS:
        assert 0.4e9 < plan("qwen3-0.6b", engine="vllm", precision=precision).file_bytes < 2.5e9


@pytest.mark.parametrize(
    ("name", "context", "weights", "host", "cache", "buffers"),
    [("llama-3.1-8b", 2048, 4403.49, 281.81, 256, 258.5), ("qwen2.5-7b", 4096, 4168.09, 292.36, 224, 304)],
)
def test_llama_cpp_log(name, context, weights, host, cache, buffers):
    """MiB that llama.cpp reports: CUDA0, CPU_Mapped, KV and compute buffer."""
    served = plan(name, "rtx-4090", engine="llama.cpp", context=context)
    assert served.parts["weights"] / MIB == pytest.approx(weights, rel=0.01)
    assert served.host_bytes / MIB == pytest.approx(host, rel=0.01)
    assert served.parts["cache"] == cache * MIB
    assert served.compute_bytes.low < buffers * MIB <= served.compute_bytes.high


@pytest.mark.parametrize(
    ("name", "context", "cache", "weights"),
    [("llama-3.1-8b", 37696, 4.60, 14.99), ("qwen2.5-7b", 597776, 31.92, 14.25)],
)
def test_vllm_log(name, context, cache, weights):
    served = plan(name, engine="vllm", context=context)
    assert served.parts["cache"] / GIB == pytest.approx(cache, abs=0.02)
    assert served.parts["weights"] / GIB == pytest.approx(weights, rel=0.005)


@pytest.mark.parametrize(
    ("name", "precision", "size"),
    [("qwen2.5-7b", "nf4", 5.43 * GIB), ("llama-3.1-8b", "fp8", 9.08e9), ("llama-3.1-8b", "int4", 5.73e9)],
)
def test_vllm_quantized(name, precision, size):
    assert plan(name, engine="vllm", precision=precision).file_bytes == pytest.approx(size, rel=0.015)


def test_sliding_window():
    """Gemma 2 2B, 13 layers of each kind, 1024 numbers a token each of keys and values; its log: 416 MiB for 8192."""
    gemma = config("gemma-2-2b")
    window = 13 * 2 * 1024 * 2 * (4096 + 512)
    assert count_request_kv_cache_bytes(gemma, 16384, "llama.cpp") == 2 * 416 * MIB + window
    assert count_request_kv_cache_bytes(gemma, 8192, "llama.cpp") == 416 * MIB + window
    assert count_request_kv_cache_bytes(gemma, 1000, "llama.cpp") == 2 * 13 * 2 * 1024 * 2 * 1024
    mistral = config("mistral-7b-v0.1")  # one window for all layers, which vLLM alone knows
    assert count_request_kv_cache_bytes(mistral, 32768, "llama.cpp") == 32768 * 131072
    assert count_request_kv_cache_bytes(mistral, 32768, "vllm", "bf16", 2048) < 6400 * 131072


def test_adapter_beside_the_model():
    assert plan().merged
    assert plan().parts["adapter"] == 0
    assert plan(adapter_rank=12).parts["adapter"] == 60 * MIB  # 20.97e6 numbers a rank of 8 in 16 bits
    beside = plan(engine="vllm", adapter_rank=12)  # vLLM reserves rank 16
    assert (beside.merged, beside.parts["adapter"]) == (False, 80 * MIB)
    with pytest.raises(UsageError, match=r"\b1000\b"):
        plan(engine="vllm", adapter_rank=1000)


def test_where_the_embeddings_are():
    tied, unified = plan("qwen3-4b", "rtx-4090"), plan(gpu="m4-24gb")
    assert tied.host_bytes > 300e6  # and again on the device, as the head
    assert tied.parts["weights"] == count_weight_and_embedding_bytes(model("qwen3-4b"), "Q4_K_M")[0]
    assert (unified.host_bytes, unified.parts["weights"]) == (0, count_weight_and_embedding_bytes(model(), "Q4_K_M")[0])


def test_verdicts():
    assert plan(gpu="rtx-3060-12gb").verdict == "fits"
    too_large = plan("llama-3.1-70b", "rtx-4090")
    assert (too_large.verdict, too_large.max_context) == ("does not fit", 0)
    served = plan()
    assert (served.verdict, served.usable_bytes, served.max_context) == (None, None, None)
    middle = make_gpu_with_memory(f"{sum(served.need_bytes) / 2 / GIB:.3f}GiB")
    assert estimate_serving_memory(config(), gpu=middle).verdict == "tight"


@pytest.mark.parametrize("engine", ENGINES)
def test_longest_context_fits_and_no_longer_one(engine):
    settings = {"engine": engine, "gpu": "m4-24gb" if engine == "mlx" else "l4", "sequences": 4}
    longest = plan(**settings).max_context
    assert longest % 256 == 0
    assert 0 < longest < 131072
    assert plan(**settings, context=longest).verdict == "fits"
    assert plan(**settings, context=longest + 256).verdict != "fits"


def test_speed_is_given_where_the_model_is_on_the_gpu():
    fits, too_large = plan(gpu="rtx-4090"), plan("llama-3.1-70b", "rtx-4090")
    assert 90 < fits.decode_tokens_per_second.low < fits.decode_tokens_per_second.high < 170
    assert fits.evidence["decode_tokens_per_second"] == "published"
    assert (too_large.decode_tokens_per_second, plan().prefill_tokens_per_second) == (None, None)


def test_a_token_reads_the_experts_of_its_router():
    experts = AutoConfig.for_model(
        "qwen3_moe", hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        moe_intermediate_size=128, num_experts=16, num_experts_per_tok=2, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    built = build_adapted_meta_model(experts, None, torch.bfloat16)
    total, embedding = count_weight_and_embedding_bytes(built, "F16")
    assert total - embedding - count_weight_bytes_and_macs_per_token(built, "F16")[0] == 2 * 14 * 3 * 256 * 128 * 2


@pytest.mark.parametrize(
    ("name", "picked", "experts"),
    [
        ("qwen3.5-35b-a3b", 8, 256),  # num_experts_per_tok
        ("gemma-4-26b-a4b", 8, 128),  # top_k_experts
        ("ernie-4.5-21b-a3b", 6, 64),  # moe_k
        ("glm-4.7-flash", 4, 64),
        ("nemotron-3-nano-30b-a3b", 6, 128),
        ("llama-4-scout", 1, 16),
        ("lfm2-8b-a1b", 4, 32),
        ("gpt-oss-20b", 4, 32),
        ("qwen3-next-80b-a3b", 10, 512),
    ],
)
def test_experts_that_a_token_reads(name, picked, experts):
    built = model(name)
    held = sum(p.numel() for p in built.parameters() if p.dim() == 3 and p.shape[0] == experts)
    head = built.get_output_embeddings()
    others = sum(m.weight.numel() for m in built.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    multiplied = count_weight_bytes_and_macs_per_token(built, "F16")[1]
    assert multiplied == pytest.approx(others + held * picked / experts, rel=0.01)


def test_per_layer_embeddings_are_looked_up_in_cpu_memory():
    """Gemma 4 E2B: 2.35 of its 4.6 billion numbers."""
    looked_up = 262144 * 35 * 256
    served = plan("gemma-4-e2b", "rtx-4090", precision="F16")
    assert served.host_bytes == 2 * (looked_up + 262144 * 1536)
    read = count_weight_bytes_and_macs_per_token(model("gemma-4-e2b"), "F16")[0]
    assert read < served.file_bytes - 2 * looked_up + 2e7


def test_the_language_part_of_a_base_that_sees():
    both = AutoConfig.for_model("qwen2_vl")
    text = estimate_serving_memory(both, precision="F16")
    assert text.bits == pytest.approx(16, abs=0.1)
    assert len(text.notes) == 1
    assert text.file_bytes < estimate_serving_memory(both, engine="vllm").parts["weights"]


def test_quantized_cache():
    sizes = [plan(cache=c).parts["cache"] / MIB for c in ("f16", "q8_0", "q4_0")]
    assert sizes == [512, 272, 144]
    assert plan(engine="vllm", cache="fp8").parts["cache"] == 256 * MIB


def test_json():
    served = plan(gpu="rtx-4090")
    printed = json.loads(json.dumps(to_json_dict(served)))
    assert printed["need_bytes"] == {"low": served.need_bytes.low, "high": served.need_bytes.high}
    assert set(served.evidence) > set(served.parts)
    assert all(isinstance(n, int) for n in (*served.need_bytes, *served.compute_bytes, *served.usable_bytes))
    assert "rtx-4090" in served.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "lama.cpp"}, "llama.cpp"),
        ({"precision": "q4_km"}, "q4_k_m"),
        ({"engine": "vllm", "precision": "fp4"}, "fp8"),
        ({"cache": "q8_1"}, "q8_0"),
        ({"context": 0}, "context is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"adapter_rank": 0}, "rank is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        plan(**settings)


def test_layers_whose_cache_is_not_known():
    with pytest.raises(ModelError, match="minimax"):
        estimate_serving_memory(AutoConfig.for_model("minimax", num_hidden_layers=2))
    with pytest.raises(ModelError, match="heads"):
        estimate_serving_memory(AutoConfig.for_model("rwkv"))


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_next",
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("mamba2", "bamba", "falcon_h1", "jamba", "lfm2")),
    ],
)
def test_state_of_recurrent_layers(family):
    """It is what transformers keeps, but for the oldest input of a convolution, which the next token does not need."""
    base = tiny_families.build_family(family)
    with torch.no_grad():
        filled = base(torch.ones(1, 256, dtype=torch.long), use_cache=True).past_key_values
    numbers = 0
    for layer in filled.layers:
        for states, is_convolution in ((getattr(layer, "conv_states", None), True),
                                       (getattr(layer, "recurrent_states", None), False)):  # fmt: skip
            for state in (states or {}).values() if isinstance(states, dict) else states or []:
                if state is not None:
                    numbers += state.numel() - (state[..., 0].numel() if is_convolution else 0)
    assert numbers > 0
    assert count_recurrent_state_bytes(base) == 4 * numbers


def test_cache_of_hybrids():
    """Qwen3.5 9B: 8 of 32 layers cache 2 · 4 heads of 256; the others keep 32 states of 128 · 128 and 3 inputs."""
    base = model("qwen3.5-9b")
    assert count_request_kv_cache_bytes(base.config, 4096, "ollama") == 8 * 2 * 4 * 256 * 4096 * 2
    assert count_recurrent_state_bytes(base) == 24 * 4 * (32 * 128 * 128 + 3 * (2 * 16 + 32) * 128)
    served = plan("qwen3.5-9b", "rtx-4090")
    assert (served.verdict, served.parts["state"]) == ("fits", count_recurrent_state_bytes(base))


def test_latent_attention_caches_one_vector_for_all_heads():
    """GLM-4.7-Flash: a latent of 512 numbers and a rotated key of 64 in each of 47 layers."""
    for engine in ("llama.cpp", "vllm"):
        assert count_request_kv_cache_bytes(config("glm-4.7-flash"), 4096, engine) == 47 * (512 + 64) * 4096 * 2


def test_compressed_attention_caches_as_little_as_published():
    """DeepSeek V4 Flash: 13.7 times less than V3.2 at 1M tokens, with FP8 and FP4 in both (mlx-lm issue 1281)."""
    older, newer = (config(f"deepseek-v{version}") for version in ("3.2", "4-flash"))
    ratio = count_request_kv_cache_bytes(older, 1 << 20, "vllm") / count_request_kv_cache_bytes(newer, 1 << 20, "vllm")
    assert ratio == pytest.approx(13.7, rel=0.1)


def test_cache_of_lfm3_is_the_published_one():
    """1.6 GB for 128,000 tokens (huggingface.co/LiquidAI/LFM3-1.7B)."""
    assert count_request_kv_cache_bytes(config("lfm3-1.7b"), 128000, "llama.cpp") == pytest.approx(1.6e9, rel=0.03)


def test_an_index_caches_a_key_of_its_own():
    """Qwen3.8-Flash-Next: 54 KiB a token in float32 (docs/qwen38.md of github.com/JustVugg/colibri)."""
    in_16_bits = count_request_kv_cache_bytes(config("qwen3.8-flash-next"), 4096, "llama.cpp")
    assert 2 * in_16_bits / 4096 == pytest.approx(54 * 1024, rel=0.01)
    sparse = count_request_kv_cache_bytes(config("minimax-m3"), 4096, "llama.cpp")
    assert sparse == 4096 * 2 * (60 * 2 * 4 * 128 + 57 * 128)


def test_delta_attention_keeps_a_matrix_for_each_head():
    """Kimi Linear: 20 layers of 32 heads of 128 · 128, and the last 3 inputs of its convolution."""
    assert count_recurrent_state_bytes(model("kimi-linear-48b-a3b")) == 20 * 4 * 32 * 128 * (128 + 3 * 3)


def test_chunked_attention_caches_a_chunk():
    """Llama 4 Scout: 36 of 48 layers attend to at most 8192 tokens; 8 heads of 128."""
    chunk = 36 * (8192 + 512)
    assert count_request_kv_cache_bytes(config("llama-4-scout"), 65536, "llama.cpp") == (chunk + 12 * 65536) * 4 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_known_base(engine):
    for name in load_known_models_by_alias():
        need = plan(name, engine=engine).need_bytes
        assert 0 < need.low < need.high, name


@pytest.mark.parametrize(("name", "size"), [("gpt-oss-20b", 12109566560), ("gpt-oss-120b", 63387346208)])
def test_mxfp4_is_the_default_of_a_base_published_in_it(name, size):
    """ggml-org's files, of 11.27 and 59.02 GiB."""
    served = plan(name, "h100")
    assert (served.precision, served.verdict) == ("MXFP4", "fits")
    assert served.file_bytes == pytest.approx(size, rel=0.01)
    beside = plan(name, "h100", engine="vllm")
    assert (beside.precision, beside.verdict) == ("mxfp4", "fits")


def test_fp8_is_the_default_of_vllm_for_a_base_published_in_it():
    published = config()
    published.quantization_config = {"quant_method": "fp8"}
    assert [estimate_serving_memory(published, engine=e).precision for e in ("vllm", "ollama")] == ["fp8", "Q4_K_M"]


@pytest.mark.parametrize(
    ("name", "precision", "bits"),
    [("llama-3.1-8b", None, 4.5), ("llama-3.1-8b", "8bit", 8.5), ("qwen3-0.6b", "6bit", 6.5), ("qwen3-4b", "bf16", 16)],
)
def test_mlx_quantizes_embeddings_and_head_too(name, precision, bits):
    served = plan(name, "m4-max-64gb", engine="mlx", precision=precision)
    assert served.bits == pytest.approx(bits, abs=0.01)
    assert served.parts["weights"] == served.file_bytes  # in unified memory
    assert (served.host_bytes, served.verdict) == (0, "fits")
    assert served.evidence["decode_tokens_per_second"] == "published"


def test_mlx_of_a_base_published_in_mxfp4():
    served = plan("gpt-oss-20b", "m5-max-64gb", engine="mlx")
    assert served.precision == "mxfp4-q8"
    assert served.file_bytes == pytest.approx(12.1e9, rel=0.01)  # mlx-community/gpt-oss-20b-MXFP4-Q8
    assert served.evidence["prefill_tokens_per_second"] == "published"  # of an M5 27 prompts by two authors


def test_mlx_is_planned_on_macs():
    with pytest.raises(UsageError, match="rtx-3090"):
        plan(gpu="rtx-3090", engine="mlx")
    assert plan("llama-3.1-70b", "m2-max-32gb", engine="mlx").verdict == "does not fit"


def test_cache_of_layers_with_other_heads():
    """Gemma 4's full layers have 4 heads of 512, its others 16 of 256; E2B's last 20 layers have no cache."""
    large, small = (load_base_config(name).config for name in ("gemma-4-31b", "gemma-4-e2b"))
    window = 1024 + 512  # and the tokens that are computed at once
    assert count_request_kv_cache_bytes(large, 4096, "ollama") == 2 * 2 * (10 * 4 * 512 * 4096 + 50 * 16 * 256 * window)
    assert count_request_kv_cache_bytes(small, 4096, "ollama") == 2 * 2 * (3 * 512 * 4096 + 12 * 256 * (512 + 512))


SHARED_KEYS = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "sliding_window": 512, "max_position_embeddings": 512}


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_cache_of_layers_that_share_keys(family):
    """The last layers of Gemma 3n and 4 read the keys and values of earlier ones: transformers caches none for them."""
    base = tiny_families.build(family, **SHARED_KEYS).to(torch.float16)
    with torch.no_grad():
        filled = base(torch.ones(1, 256, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in filled.layers for t in (layer.keys, layer.values) if t is not None)
    assert count_request_kv_cache_bytes(base.config, 256, "llama.cpp") == real


# --- speed ------------------------------------------------------------------------------------------------------------

LLAMA_8B = {  # in Q4_K_M
    "weight_bytes_per_token": 4.61e9, "kv_bytes_per_request": 0, "matmul_weight_count": 6.98e9,
    "layers": 32, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("group", published.GROUPS)
def test_published_runs_of_the_fit(published_rows, group):
    assert published.is_good(published_rows, group)


@pytest.mark.slow
@pytest.mark.parametrize("points", [published.THIRD_POINTS, published.FOURTH_POINTS, published.FIFTH_POINTS])
def test_published_runs_that_judged_earlier_fits(points):
    rows = [row for row in published.compare_points(points) if row["kind"][0] != "vllm"]
    assert all(published.is_good(rows, group) for group in published.GROUPS)


@pytest.mark.slow
def test_published_runs_that_no_fit_has_seen():
    rows = published.compare_points([p for p in published.SIXTH_POINTS if not published.is_on_intel(p)])
    rows = [row for row in rows if row["kind"][0] != "vllm"]
    assert all(published.is_good(rows, group) for group in published.GROUPS)


@pytest.fixture(scope="module")
def published_rows():
    return [row for row in published.compare_points() if row["kind"][0] == "llama.cpp"]


def test_every_published_run_has_its_source():
    assert all(
        p["source"] and p["date"] and isinstance(p["seen"], bool) and require_gpu_by_name(p["card"])
        for p in published.POINTS
    )


@pytest.mark.parametrize(
    ("points", "earlier"),
    [
        (published.THIRD_POINTS, []),
        (published.FOURTH_POINTS, published.THIRD_POINTS),
        (published.FIFTH_POINTS, [*published.THIRD_POINTS, *published.FOURTH_POINTS]),
        (published.SIXTH_POINTS, [*published.THIRD_POINTS, *published.FOURTH_POINTS, *published.FIFTH_POINTS]),
    ],
)
def test_a_later_set_has_no_source_of_an_earlier_one(points, earlier):
    file = Path(published.__file__).parent / "data" / "serving_points_other.json"
    seen = [*published.POINTS, *published.SECOND_POINTS, *json.loads(file.read_text(encoding="utf-8")), *earlier]
    assert not {published.name_source(p["source"]) for p in points} & {published.name_source(p["source"]) for p in seen}
    assert {published.get_group(p) for p in points} == set(published.GROUPS)
    assert all(p["date"] and p["seen"] and require_gpu_by_name(p["card"]) for p in points)


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        ("v100-32gb", "nvidia hbm"), ("a100-80gb", "nvidia hbm"), ("p100", "nvidia p100"), ("p40", "nvidia pascal"),
        ("h100-sxm", "nvidia hbm3"), ("b200", "nvidia hbm3"), ("l40s", "nvidia"), ("mi50-32gb", "amd hbm"),
        ("a30", "nvidia hbm"), ("rtx-pro-6000-server", "nvidia"),
    ],
)  # fmt: skip
def test_datacentre_gpus_have_fits_of_their_own(card, kind):
    gpu = require_gpu_by_name(card)
    assert get_serving_fit_hardware_key(gpu) == kind
    assert get_serving_fit_key(gpu, "llama.cpp")[1] in (kind, f"{kind} {gpu.architecture}")
    assert get_serving_fit_key(gpu, "vllm")[1] in (kind, gpu.vendor)


def test_rdna4_has_a_fit_of_its_own_for_prompts():
    gpu = require_gpu_by_name("rx-9070-xt")
    assert get_serving_fit_key(gpu, "ollama", PREFILL) == ("llama.cpp", "amd rdna4")
    assert get_serving_fit_key(gpu, "ollama") == ("llama.cpp", "amd")


@pytest.mark.parametrize("name", ["rtx-3060-12gb", "rtx-5090"])
def test_a_scan_takes_as_long_on_every_gpu(name):
    """Of a prompt, a recurrent layer takes the same time longer than one of attention on a small and a large GPU."""
    plain, recurrent = (
        estimate_decode_and_prefill_speed(
            require_gpu_by_name(name), "llama.cpp", **LLAMA_8B, structure=LayerStructure(recurrent_layers=n)
        ).prefill
        for n in (0, 24)
    )
    seconds = [(p.low * p.high) ** -0.5 for p in (plain, recurrent)]
    assert seconds[1] - seconds[0] == pytest.approx(24 * 1.6e-6)


@pytest.mark.parametrize("engine", ["mlx", "llama.cpp"])
def test_the_m5_has_a_fit_of_its_own(engine):
    assert get_serving_fit_key(require_gpu_by_name("m5"), engine) == (engine, "apple m5")
    assert get_serving_fit_key(require_gpu_by_name("m6"), engine) == (engine, "apple m5")
    assert get_serving_fit_key(require_gpu_by_name("m4"), engine) == (engine, "apple")


def test_speeds_of_an_m6_are_guessed():
    speed = estimate_decode_and_prefill_speed(require_gpu_by_name("m6"), "llama.cpp", **LLAMA_8B)
    assert (speed.evidence, speed.prefill_evidence) == ("guessed", "guessed")


def test_layers_that_are_no_attention():
    """A short convolution takes less than a layer of attention; Ollama computes Qwen3.5 slowly in some versions."""
    gpu = require_gpu_by_name("m4-max-64gb")
    plain = estimate_decode_and_prefill_speed(gpu, "llama.cpp", **LLAMA_8B)

    def speed(engine, **structure):
        return estimate_decode_and_prefill_speed(gpu, engine, **LLAMA_8B, structure=LayerStructure(**structure)).decode

    assert speed("llama.cpp", convolution_layers=24).high > plain.decode.high * 1.01
    own, slow = speed("llama.cpp", recurrent_layers=24), speed("ollama", recurrent_layers=24, is_slow_in_ollama=True)
    assert 1.05 * slow.high < own.high
    assert slow.low < 0.75 * own.low
    assert describe_layer_structure(model("lfm2-1.2b"), "Q4_K_M")[:4] == (0, 0, 10, False)
    assert describe_layer_structure(model("qwen3.5-0.8b"), "Q4_K_M")[:4] == (0, 18, 0, True)


def test_sources_of_each_group_are_on_both_sides():
    sides = {(published.get_group(p), published.is_held_out(p)) for p in published.POINTS}
    assert sides == {(g, held) for g in ("dense", "mixtures", "hybrids", "prompts") for held in (False, True)}
    held = {published.name_source(p["source"]) for p in published.POINTS if published.is_held_out(p)}
    assert not held & published.EARLIER_SOURCES


def test_points_of_other_engines_are_split_by_the_same_rule():
    file = Path(published.__file__).parent / "data" / "serving_points_other.json"
    points = json.loads(file.read_text(encoding="utf-8"))
    assert all(p["source"] and p["date"] for p in points)
    assert [p.get("held_out", False) for p in points] == [published.is_held_out(p) for p in points]


@pytest.mark.slow
def test_published_runs_of_mlx():
    """Nine in ten of the runs that the fits saw are inside."""
    file = Path(published.__file__).parent / "data" / "serving_points_other.json"
    rows = []
    for point in [*published.POINTS, *json.loads(file.read_text(encoding="utf-8"))]:
        if point["engine"] == "mlx" and point["seen"] and not published.is_held_out(point):
            band = published.predict(point)
            rows.append(band.low <= point["tokens_per_second"] <= band.high)
    assert len(rows) >= 120
    assert sum(rows) >= 0.9 * len(rows)


def test_formula_of_the_speed():
    gpu, fit = require_gpu_by_name("rtx-3090"), DECODING["llama.cpp", "nvidia"]
    speed = estimate_decode_and_prefill_speed(gpu, "llama.cpp", **LLAMA_8B)
    seconds = 4.61e9 / (fit.bandwidth_share * 936e9) + 32 * fit.layer_s
    assert (*speed.decode,) == pytest.approx([1 / fit.spread / seconds, fit.spread / seconds])
    assert speed.decode.low < 111.7 < speed.decode.high  # XiongjieDai, May 2024
    assert speed.prefill.low < 3865 < speed.prefill.high


def test_requests_decoded_together_share_the_reading_of_the_weights():
    one, eight, many = (
        estimate_decode_and_prefill_speed(
            require_gpu_by_name("a100-80gb"), "vllm", **LLAMA_8B, concurrent_requests=n
        ).decode.low
        for n in (1, 8, 4000)
    )
    assert one == eight > 8 * many


def test_hardware_without_a_bandwidth_has_no_speed():
    assert estimate_decode_and_prefill_speed(make_gpu_with_memory("24GiB"), "ollama", **LLAMA_8B) is None


@pytest.mark.slow
def test_sources_on_arc_that_the_fit_has_not_seen():
    """Of llama.cpp nine in ten are inside; so are those of vLLM, which has no fit on Arc."""
    arc = [p for p in (*published.INTEL_POINTS, *published.SIXTH_POINTS) if published.is_on_intel(p)]
    sources = [
        {published.name_source(p["source"]) for p in arc if p.get("held_out", False) is held and p["engine"] != "vllm"}
        for held in (False, True)
    ]
    assert not sources[0] & sources[1]
    rows = published.compare_points([p for p in published.INTEL_POINTS if p["held_out"]])
    assert sum(r["inside"] for r in rows) >= 0.9 * len(rows)


@pytest.mark.parametrize(("card", "engine"), [("arc-b580", "vllm"), ("m4-max-64gb", "vllm"), ("arc-140v", "llama.cpp")])
def test_hardware_without_runs_is_guessed_and_says_why(card, engine):
    gpu = require_gpu_by_name(card)
    speed = estimate_decode_and_prefill_speed(gpu, engine, **LLAMA_8B)
    assert (speed.evidence, speed.prefill_evidence) == ("guessed", "guessed")
    assert len(list(describe_guessed_speeds(gpu, engine))) == 1
    assert 4.61e9 * speed.decode.high <= gpu.bandwidth


def test_a_guess_is_as_wide_as_all_fits_of_the_engine_and_of_the_vendor():
    gpu = require_gpu_by_name("m4-max-64gb")
    guessed, *fitted = (estimate_decode_and_prefill_speed(gpu, e, **LLAMA_8B) for e in ("vllm", "mlx", "llama.cpp"))
    assert all(guessed.decode.low <= s.decode.low and s.decode.high <= guessed.decode.high for s in fitted)


@pytest.mark.parametrize("card", ["rtx-3090", "m4-max-64gb", "rx-7900-xtx", "arc-pro-b70"])
def test_fitted_speeds_have_no_reason_of_a_guess(card):
    assert not list(describe_guessed_speeds(require_gpu_by_name(card), "ollama"))


@pytest.mark.parametrize(("card", "engine"), [("p40", "vllm"), ("rx-6800-xt", "vllm"), ("v100-32gb", "vllm")])
def test_an_engine_that_does_not_run_there_is_an_error(card, engine):
    with pytest.raises(UsageError, match=card):
        plan("llama-3.2-1b", card, engine=engine)
