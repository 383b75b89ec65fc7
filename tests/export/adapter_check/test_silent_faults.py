"""Silent faults that people reported, made again in a file: each is named by its cause."""

import json
import re

import pytest
import torch
from chatml import CHATML
from faulty_adapters import edit_config, edit_tensors, make_base, rename, save_adapter, save_base

from slimtune.export.verify import check_adapter


def zero_b(tensors, part=""):
    return {k: t * 0 if "lora_B" in k and part in k else t for k, t in tensors.items()}


def split_experts(tensors):
    """As trainers on transformers 4 wrote them: two matrices for each expert's module."""
    kept = {k: t for k, t in tensors.items() if "experts" not in k}
    for layer in range(2):
        for expert in range(3):
            for name, shape in (("gate_proj", (12, 16)), ("up_proj", (12, 16)), ("down_proj", (16, 12))):
                module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                kept[f"{module}.lora_A.weight"] = torch.ones(4, shape[1])
                kept[f"{module}.lora_B.weight"] = torch.ones(shape[0], 4)
    return kept


def name_two_adapters(tensors):
    return {k.replace(".weight", f".{name}.weight"): t for k, t in tensors.items() for name in "ab"}


def join_projections(folder):
    """As trainers of bases with one qkv_proj write them: one A, the rows of B one after the other."""

    def join(tensors):
        kept = {k: t for k, t in tensors.items() if not re.search("[kv]_proj", k)}
        for key in [k for k in kept if "q_proj" in k]:
            rows = [tensors[key.replace("q_proj", f"{x}_proj")] for x in ("qkv" if "lora_B" in key else "q")]
            kept[key.replace("q_proj", "qkv_proj")] = torch.cat(rows)
            del kept[key]
        return kept

    edit_tensors(folder, join)
    edit_config(folder, target_modules=["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def swap_halves(tensors):
    return {k.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B"): t for k, t in tensors.items()}


def swap_experts_in_and_out(tensors):
    """As readers that take (experts, in, out) for (experts, out, in) write them."""
    return {k: t.T if "experts" in k else t for k, t in tensors.items()}


def keep_share_of_one_process(tensors):
    """Half the rows of B of column-parallel maps, half the columns of A of row-parallel ones."""
    rows = {k: t[: len(t) // 2] for k, t in tensors.items() if "lora_B" in k and not re.search("o_proj|down_proj", k)}
    columns = {k: t[:, : t.shape[1] // 2] for k, t in tensors.items() if re.search("(o_proj|down_proj).lora_A", k)}
    return {**tensors, **rows, **columns}


def name_as_mlx_does(tensors):
    names = {k: re.sub(r"base_model\.model\.(.*)\.lora_([AB])\.weight", r"\1.lora_\2", k) for k in tensors}
    return {re.sub(r"lora_([AB])$", lambda m: f"lora_{m[1].lower()}", names[k]): t.T for k, t in tensors.items()}


FAULTS = {
    # code: (adapter, where it was reported, what happened to the file)
    "compiled": ("key-prefix", "plain", "MakazhanAlpamys/Soup#335",
        lambda f: rename(f, "base_model.model.", "_orig_mod.base_model.model.")),
    "compiled-inside": ("key-prefix", "plain", "huggingface/peft#2957",
        lambda f: rename(f, "model.layers", "_orig_mod.model.layers")),
    "ddp": ("key-prefix", "plain", "FareedKhan-dev/train-llm-from-scratch#37",
        lambda f: rename(f, "base_model.", "module.base_model.")),
    "streamed": ("key-prefix", "plain", "MakazhanAlpamys/Soup#335",
        lambda f: rename(f, ".self_attn.", ".inner.self_attn.")),
    "raw-state-dict": ("key-prefix", "plain", "huggingface/peft#1323",
        lambda f: edit_tensors(f, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})),
    "no-prefix": ("key-prefix", "plain", "vllm-project/vllm#45716", lambda f: rename(f, "base_model.model.", "")),
    "backbone": ("key-prefix", "plain", "huggingface/peft#1579",
        lambda f: rename(f, "model.model.layers", "model.layers")),
    "zero3-placeholders": ("empty-tensors", "plain", "huggingface/peft#2500",
        lambda f: edit_tensors(f, lambda t: {k: v[:0, :0] for k, v in t.items()})),
    "zero3-nothing": ("no-tensors", "plain", "huggingface/peft#2892", lambda f: edit_tensors(f, lambda t: {})),
    "shards": ("flat-tensors", "plain", "huggingface/peft#1710",
        lambda f: edit_tensors(f, lambda t: {k: v.flatten()[:8] for k, v in t.items()})),
    "no-gradient": ("untrained", "plain", "huggingface/peft#1402", lambda f: edit_tensors(f, zero_b)),
    "untrained-experts": ("untrained-modules", "experts", "unslothai/unsloth#3405",
        lambda f: edit_tensors(f, lambda t: zero_b(t, "experts"))),
    "layer-without-gradient": ("untrained-layers", "plain", "liangwq/Chatglm_lora_multi-gpu#14",
        lambda f: edit_tensors(f, lambda t: zero_b(t, ".layers.1."))),
    "split-experts": ("expert-layout", "experts", "NVIDIA-NeMo/Automodel#1755",
        lambda f: edit_tensors(f, split_experts)),
    "experts-transposed": ("transposed", "experts", "vllm-project/vllm#52194",
        lambda f: edit_tensors(f, swap_experts_in_and_out)),
    "matrices-transposed": ("transposed", "plain", "huggingface/peft#2071",
        lambda f: edit_tensors(f, lambda t: {k: v.T for k, v in t.items()})),
    "diverged": ("not-finite", "plain", "unslothai/unsloth#3385",
        lambda f: edit_tensors(f, lambda t: {k: v * float("nan") if ".1.mlp" in k else v for k, v in t.items()})),
    "other-rank": ("rank-differs", "plain", "huggingface/diffusers#14409", lambda f: edit_config(f, r=8)),
    "pattern-of-old-names": ("pattern-unmatched", "patterns", "huggingface/peft#1930",
        lambda f: edit_config(f, alpha_pattern={"attention.query": 3})),
    "magnitudes-lost": ("magnitudes-missing", "dora", "ml-explore/mlx-lm#1119",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if "magnitude" not in k})),
    "dora-flag-lost": ("dora-flag-missing", "dora", "ml-explore/mlx-lm#1119", lambda f: edit_config(f, use_dora=False)),
    "head-lost": ("saved-module-missing", "head", "huggingface/sentence-transformers#3980",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})),
    "resized": ("vocabulary", "head", "hiyouga/LlamaFactory#7997",
        lambda f: edit_tensors(f, lambda t: {k: v.repeat(2, 1) if "lm_head" in k else v for k, v in t.items()})),
    "half-lost": ("missing-half", "plain", "hiyouga/LlamaFactory#852",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if ".1.mlp.up_proj.lora_B" not in k})),
    "one-rank-saved": ("missing-layers", "plain", "huggingface/peft#453",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k})),
    "targets-cut": ("untargeted", "plain", "vllm-project/vllm#55193",
        lambda f: edit_config(f, target_modules=["q_proj"])),
    "start-kept": ("start-in-base", "pissa", "hiyouga/LlamaFactory#4682", lambda f: None),
    "two-adapters": ("several-adapters", "plain", "huggingface/peft#2270",
        lambda f: edit_tensors(f, name_two_adapters)),
    "other-template": ("template", "plain", "hiyouga/LlamaFactory#6320",
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")),
    "other-end": ("special-tokens", "plain", "ollama/ollama#6823",
        lambda f: (f / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))),
    "linear-in-and-out": ("key-prefix", "plain", "NVIDIA-NeMo/Speech#14899",
        lambda f: [rename(f, "lora_A", "adapter.linear_in"), rename(f, "lora_B", "adapter.linear_out")]),
    "biases-outside": ("key-prefix", "biases", "huggingface/peft#741", lambda f: rename(f, ".base_layer.", ".")),
    "biases-of-b": ("bias-flag-missing", "biases-of-b", "vllm-project/vllm#5733",
        lambda f: edit_config(f, lora_bias=False)),
    "halves-swapped": ("halves-swapped", "plain", "huggingface/peft#2071", lambda f: edit_tensors(f, swap_halves)),
    "joined-projections": ("projection-layout", "shared-a", "sgl-project/sglang#6585", join_projections),
    "layers-from-1": ("unknown-modules", "plain", "NVIDIA-NeMo/Automodel#1755",
        lambda f: [rename(f, ".layers.1.", ".layers.2."), rename(f, ".layers.0.", ".layers.1.")]),
    "scale-of-0": ("config-unreadable", "plain", "NVIDIA/TensorRT-LLM#1477", lambda f: edit_config(f, lora_alpha=0)),
    "config-of-adalora": ("another-method", "plain", "huggingface/peft#1323",
        lambda f: edit_config(f, peft_type="ADALORA")),
    "config-of-loha": ("another-method", "plain", "huggingface/peft#1323", lambda f: edit_config(f, peft_type="LOHA")),
    "token-rows-lost": ("saved-module-missing", "token-rows", "vllm-project/vllm#36501",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if "token" not in k})),
    "replicas-lost": ("unknown-modules", "replicated", "unslothai/unsloth#1343",
        lambda f: edit_config(f, layer_replication=None)),
    "trained-in-4-bits": ("quantized-base", "plain", "unslothai/unsloth-zoo#810",
        lambda f: edit_config(f, base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit")),
    "loftq": ("quantized-base", "plain", "unslothai/unsloth#1089",
        lambda f: edit_config(f, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
    "trained-on-instruct": ("another-variant", "plain", "huggingface/peft#1932",
        lambda f: edit_config(f, base_model_name_or_path="org/base-Instruct")),
    "tokens-added": ("added-tokens-unsaved", "plain", "unslothai/unsloth#3428",
        lambda f: (f / "added_tokens.json").write_text(json.dumps({"<doc>": 320, "</doc>": 321}))),
    "share-of-tensor-parallelism": ("shards", "plain", "NVIDIA-NeMo/Megatron-Bridge#2240",
        lambda f: edit_tensors(f, keep_share_of_one_process)),
    "stage-of-a-pipeline": ("missing-layers", "plain", "NVIDIA-NeMo/Automodel#3096",
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if ".layers.0." not in k})),
    "tensors-of-mlx": ("key-prefix", "plain", "ml-explore/mlx-lm#1119", lambda f: edit_tensors(f, name_as_mlx_does)),
    "one-half-transposed": ("transposed", "plain", "osaurus-ai/vmlx-swift#320",
        lambda f: edit_tensors(f, lambda t: {k: v.T if "lora_B" in k else v for k, v in t.items()})),
    "embedding-not-trained": ("untargeted-in-file", "plain", "unslothai/unsloth#9326",
        lambda f: edit_config(f, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                 "down_proj", "embed_tokens", "lm_head"])),
    "last-output-not-trained": ("untrained-layers", "plain", "modelscope/mcore-bridge#173",
        lambda f: edit_tensors(f, lambda t: zero_b(t, ".layers.1.self_attn.o_proj"))),
    "names-of-consolidated-files": ("unknown-modules", "plain", "vllm-project/vllm#6573",
        lambda f: [rename(f, old, new) for old, new in (("base_model.model.model.", ""), ("self_attn.", "attention."),
                                                        ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"),
                                                        ("o_proj", "wo"), ("mlp.", "feed_forward."))]),
    "names-of-kohya": ("key-prefix", "plain", "huggingface/diffusers#3743",
        lambda f: [rename(f, "lora_A", "lora_down"), rename(f, "lora_B", "lora_up")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(adapter_copy, tiny_tokenizer, name):
    code, kind, _, damage = FAULTS[name]
    base, folder = adapter_copy(kind)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    damage(folder)
    result = check_adapter(folder, str(base))
    assert code in [f.code for f in result.file.findings]
    assert result.passed == (not any(f.severity == "fault" for f in result.file.findings))


def test_text_adapter_on_a_wrapper_of_images(tmp_path):
    """vllm-project/vllm#34186, #48019: the wrapper answers as the base does."""
    wrapper = make_base("gemma3")
    text = make_base("gemma3_text")
    adapter = save_adapter(text, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    result = check_adapter(adapter, str(save_base(wrapper, tmp_path / "base")))
    fault = next(f for f in result.file.findings if f.severity == "fault")
    assert (fault.code, fault.count, result.file.placed) == ("key-prefix", 8, 0)


def test_tied_weights_with_two_values(tmp_path):
    """huggingface/transformers#45127: merging keeps one of them."""
    model = make_base("llama", tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(
        model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    edit_tensors(adapter, lambda t: {k: v + 1 if "lm_head" in k else v for k, v in t.items()})
    assert [f.code for f in check_adapter(adapter, str(base)).file.findings] == ["tied-weights-differ"]


def test_adapter_of_the_head_alone_where_the_base_ties_it(tmp_path):
    """huggingface/peft#2018: merging changes the embedding, too."""
    model = make_base("llama", tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    assert [f.code for f in check_adapter(adapter, str(base)).file.findings] == ["tied-head"]


def test_adapter_of_a_larger_base(adapter_copy, tmp_path):
    _, adapter = adapter_copy()
    base = save_base(make_base("llama", hidden_size=32, head_dim=16), tmp_path / "base")
    assert "another-shape" in [f.code for f in check_adapter(adapter, str(base)).file.findings]


def test_adapter_of_another_family(adapter_copy, tmp_path):
    _, adapter = adapter_copy()
    result = check_adapter(adapter, str(save_base(make_base("gpt2"), tmp_path / "base")))
    assert {"targets-unmatched", "unknown-modules"} & {
        f.code for f in result.file.findings
    } or result.file.placed is None
