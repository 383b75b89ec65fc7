"""Faulty adapters that are repaired: the check names no fault any more, and PEFT computes what the good file says."""

import importlib.util
import json
import re

import peft
import pytest
import torch
import transformers as tf
from chatml import CHATML
from faulty_adapters import WEIGHTS, copy, edit_config, edit_tensors, make_base, rename, save_adapter, save_base
from safetensors.torch import load_file
from test_silent_faults import FAULTS
from tiny_gguf import write_tiny_base

from slimtune.errors import AdapterError, UsageError
from slimtune.export.adapter_repair.adapter_mends import RepairAnswers
from slimtune.export.adapter_repair.repair_adapter import repair_adapter
from slimtune.export.verify import check_adapter
from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

IDS = torch.arange(3, 60)[None]


@torch.no_grad()
def compute_log_probs(base, adapter):
    """What PEFT itself computes."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()(IDS).logits.log_softmax(-1)


def shorten_config(folder, *names):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))


MORE_FAULTS = {
    # variants of those that were reported
    "fsdp": ("key-prefix", "plain", "",
        lambda f: rename(f, ".mlp.", "._fsdp_wrapped_module.mlp.")),
    "checkpointed": ("key-prefix", "plain", "",
        lambda f: rename(f, ".self_attn.", "._checkpoint_wrapped_module.self_attn.")),
    "two-wrappers": ("key-prefix", "patterns", "",
        lambda f: rename(f, "base_model.model.", "module._orig_mod.base_model.model.")),
    "head-renamed": ("key-prefix", "head", "",
        lambda f: rename(f, "lm_head.weight", "lm_head.modules_to_save.default.weight")),
    "experts-renamed": ("key-prefix", "experts", "",
        lambda f: rename(f, "base_model.model.", "_orig_mod.base_model.model.")),
    "alpha-lost": ("alpha-missing", "plain", "", lambda f: shorten_config(f, "lora_alpha")),
    "config-lost": ("config-unreadable", "plain", "",
        lambda f: (f / "adapter_config.json").unlink()),
    "other-ranks": ("pattern-unmatched", "patterns", "",
        lambda f: edit_config(f, rank_pattern={"query": 2})),
    "targets-of-another-model": ("targets-unmatched", "plain", "",
        lambda f: edit_config(f, target_modules=["query_key_value"])),
    "wrapped-twice": ("key-prefix", "plain", "",
        lambda f: rename(f, "base_model.model.", "base_model.model.base_model.model.")),
    "layers-cut": ("untargeted", "plain", "", lambda f: edit_config(f, layers_to_transform=[0])),
    "modules-excluded": ("untargeted", "plain", "", lambda f: edit_config(f, exclude_modules=["up_proj"])),
    "transposed-and-compiled": ("transposed", "plain", "",
        lambda f: edit_tensors(f, lambda t: {k.replace("model.layers", "_orig_mod.model.layers"): v.T
                                             for k, v in t.items()})),
}  # fmt: skip
REPAIRED = {name: fault for name, fault in {**FAULTS, **MORE_FAULTS}.items() if name in {
    *MORE_FAULTS, "compiled", "compiled-inside", "ddp", "streamed", "raw-state-dict", "no-prefix", "backbone",
    "experts-transposed", "matrices-transposed", "other-rank", "dora-flag-lost", "targets-cut", "two-adapters",
    "other-template", "other-end", "linear-in-and-out", "biases-outside", "biases-of-b", "halves-swapped",
    "joined-projections", "scale-of-0", "tensors-of-mlx", "one-half-transposed", "names-of-kohya",
}}  # fmt: skip
LOST = ("zero3-placeholders", "zero3-nothing", "shards", "no-gradient", "diverged", "pattern-of-old-names",
        "magnitudes-lost", "head-lost", "resized", "half-lost", "one-rank-saved", "tokens-added", "layers-from-1",
        "config-of-adalora", "config-of-loha", "token-rows-lost", "replicas-lost", "loftq",
        "share-of-tensor-parallelism", "stage-of-a-pipeline", "names-of-consolidated-files")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MORE_FAULTS else []) for name in REPAIRED]
)
def test_fault_is_named_repaired_and_proven(adapter_copy, made_adapters, tiny_tokenizer, tmp_path, name):
    code, kind, _, damage = REPAIRED[name]
    base, folder = adapter_copy(kind)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    damage(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert code in [f.code for f in check_adapter(folder, str(base)).file.findings]
    answers = RepairAnswers(adapter_name="a", alpha=8)
    result = repair_adapter(folder, "peft", tmp_path / "out", str(base), answers)
    assert code in [m.code for m in result.mended]
    assert check_adapter(tmp_path / "out", str(base)).passed
    wanted = compute_log_probs(base, made_adapters(kind)[1])
    assert (wanted - compute_log_probs(base, tmp_path / "out")).abs().max() < 1e-5
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("name", LOST)
def test_what_was_not_saved_is_refused_by_name(adapter_copy, tmp_path, name):
    _, kind, _, damage = FAULTS[name]
    base, folder = adapter_copy(kind)
    damage(folder)
    with pytest.raises(AdapterError) as caught:
        repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert caught.value.expected
    assert not (tmp_path / "out").exists()


def test_untrained_experts_are_left_out(adapter_copy, tmp_path):
    _, kind, _, damage = FAULTS["untrained-experts"]
    base, folder = adapter_copy(kind)
    damage(folder)
    result = repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert (result.check.findings, result.check.tensors) == ([], 8)
    difference = compute_log_probs(base, folder) - compute_log_probs(base, tmp_path / "out")
    assert difference.abs().max() < 1e-6


def split_into_modules(tensors):
    """The same experts as modules of their own, rank 4: as trainers on transformers 4 write them."""
    split = {k: t for k, t in tensors.items() if "experts" not in k}
    for layer in range(2):
        place = f"base_model.model.model.layers.{layer}.mlp.experts"
        for nested, names in ((".base_layer", ("gate_proj", "up_proj")), ("", ("down_proj",))):
            A = tensors[f"{place}{nested}.lora_A.weight"].view(3, 4, -1)
            B = tensors[f"{place}{nested}.lora_B.weight"].view(-1, 4, 3)
            for expert in range(3):
                for name, rows in zip(names, B.chunk(len(names)), strict=True):
                    split[f"{place}.{expert}.{name}.lora_A.weight"] = A[expert]
                    split[f"{place}.{expert}.{name}.lora_B.weight"] = rows[:, :, expert]
    return split


@pytest.fixture
def mixture(tmp_path, tiny_tokenizer):
    """A base with three experts a layer, and its tokenizer."""
    base = save_base(make_base("qwen3_moe", vocab_size=320), tmp_path / "base")
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    return base


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3}], ids=str)
def test_vllm_gets_the_matrices_of_each_expert(mixture, tmp_path, settings):
    """vLLM's names for Qwen3MoeForCausalLM: experts.E.gate_proj, up_proj and down_proj, all three of every expert."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base, given = mixture, {"target_modules": ["q_proj"], "target_parameters": parameters, **settings}
    good = save_adapter(make_base("qwen3_moe", vocab_size=320), tmp_path / "good", **given)
    result = repair_adapter(good, "vllm", tmp_path / "out", str(base))
    assert (result.form, result.proof.passed) == ("adapter", True), result.proof
    written, expected = load_file(tmp_path / "out" / WEIGHTS), split_into_modules(load_file(good / WEIGHTS))
    assert written.keys() == expected.keys()
    scale = settings.get("lora_alpha", 8) / (2 if "use_rslora" in settings else 4)
    for key, tensor in written.items():
        assert torch.allclose(tensor, expected[key] * (scale if "lora_B" in key else 1))


def test_vllm_gets_zeros_for_what_an_expert_lacks(mixture, tmp_path):
    base = mixture
    for parameter, zero in (("mlp.experts.down_proj", "up_proj"), ("mlp.experts.gate_up_proj", "down_proj")):
        good = save_adapter(make_base("qwen3_moe", vocab_size=320), tmp_path / zero, target_modules=["q_proj"],
                            target_parameters=[parameter])  # fmt: skip
        result = repair_adapter(good, "vllm", tmp_path / f"{zero}-out", str(base))
        assert result.proof.passed, result.proof
        written = load_file(tmp_path / f"{zero}-out" / WEIGHTS)
        assert not written[f"base_model.model.model.layers.0.mlp.experts.1.{zero}.lora_B.weight"].any()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3}], ids=str)
def test_split_experts_are_stacked(tmp_path, settings):
    """NVIDIA-NeMo/Automodel#1755: experts that load and do nothing."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = make_base("qwen3_moe")
    base = save_base(model, tmp_path / "base")
    given = {"target_modules": ["q_proj"], "target_parameters": parameters, **settings}
    good = save_adapter(model, tmp_path / "good", **given)
    folder = copy(good, tmp_path / "split")
    edit_tensors(folder, split_into_modules)
    edit_config(folder, target_parameters=None, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert check_adapter(tmp_path / "out", str(base)).file.findings == []
    assert (compute_log_probs(base, good) - compute_log_probs(base, tmp_path / "out")).abs().max() < 1e-5


def test_text_adapter_on_a_wrapper_of_images(tmp_path):
    """vllm-project/vllm#34186, #48019."""
    wrapper, text = make_base("gemma3"), make_base("gemma3_text")
    base = save_base(wrapper, tmp_path / "base")
    good = save_adapter(wrapper, tmp_path / "good", target_modules=r".*language_model.*\.(q_proj|up_proj)")
    folder = save_adapter(text, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    trained = load_file(good / "adapter_model.safetensors")
    edit_tensors(folder, lambda _: {k.replace("language_model.", ""): v for k, v in trained.items()})
    repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert check_adapter(tmp_path / "out", str(base)).passed
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    wanted = peft.PeftModel.from_pretrained(model, good).eval()(IDS).logits
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    assert (wanted - peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}])
def test_split_projections_are_joined(tmp_path, settings):
    """vllm-project/vllm#4915: Phi-3, trained as if its q, k and v were modules of their own."""
    base, split, weights = make_base("phi3"), make_base("llama", rms_norm_eps=1e-5), {}
    for key, weight in base.state_dict().items():
        joined = re.search("qkv_proj|gate_up_proj", key)
        parts = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}[joined[0]] if joined else ()
        for part, rows in zip(parts, weight.split((16, 8, 8) if len(parts) == 3 else 24), strict=True) if parts else ():
            weights[key.replace(joined[0], f"{part}_proj")] = rows
        weights |= {} if parts else {key: weight}
    split.load_state_dict(weights)
    save_base(split, tmp_path / "split")
    folder = save_adapter(split, tmp_path / "adapter", **settings)
    wanted = compute_log_probs(tmp_path / "split", folder)
    result = repair_adapter(folder, "peft", tmp_path / "out", str(save_base(base, tmp_path / "base")))
    assert "projection-layout" in [m.code for m in result.mended]
    assert (wanted - compute_log_probs(tmp_path / "base", tmp_path / "out")).abs().max() < 1e-5


@pytest.fixture
def tied(tmp_path, tiny_llama, tiny_tokenizer):
    """A base whose head is the embedding."""
    model = tiny_llama(tie_word_embeddings=True, initializer_range=0.2)
    base = save_base(model, tmp_path / "base")
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    return model, base


def test_two_values_of_a_tied_weight_are_merged_into_an_untied_base(tied, tmp_path):
    """huggingface/transformers#45127: loaders keep one of them."""
    model, base = tied
    whole = ["lm_head", "embed_tokens"]
    folder = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=whole)
    edit_tensors(folder, lambda t: {k: v + 0.1 if "lm_head" in k else v for k, v in t.items()})
    result = repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert (result.form, result.proof.passed) == ("merged", True)
    untied = tf.AutoModelForCausalLM.from_pretrained(base)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    wanted = peft.PeftModel.from_pretrained(untied, folder).eval()(IDS).logits
    written = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert (wanted - written).abs().max() < 1e-4


def test_start_in_the_base_is_folded(tied, tmp_path):
    """hiyouga/LlamaFactory#4682: a PiSSA that is read as a plain LoRA."""
    model, base = tied
    folder = save_adapter(model, tmp_path / "adapter", init_lora_weights="pissa")
    wanted = compute_log_probs(base, folder)
    result = repair_adapter(folder, "peft", tmp_path / "out", str(base))
    assert ([m.code for m in result.mended], result.proof.passed) == (["start-in-base"], True), result.proof
    assert check_adapter(tmp_path / "out", str(base)).file.findings == []
    assert (wanted - compute_log_probs(base, tmp_path / "out")).abs().max() < 1e-3


def test_what_vllm_cannot_add_is_merged(tied, tmp_path):
    model, base = tied
    folder = save_adapter(model, tmp_path / "adapter", use_dora=True)
    rename(folder, "base_model.model.", "")
    result = repair_adapter(folder, "vllm", tmp_path / "out", str(base))
    assert (result.form, result.proof.passed, len(result.merged_because)) == ("merged", True, 1)
    written = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits.log_softmax(-1)
    assert (written - compute_log_probs(base, result.check.adapter)).abs().max() < 1e-4
    with pytest.raises(AdapterError):
        repair_adapter(folder, "vllm", tmp_path / "none", str(base), may_merge=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_scales_are_folded_for_vllm(tied, tmp_path):
    """vllm-project/vllm#10798: patterns and rsLoRA's scale, which not every release reads."""
    model, base = tied
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    folder = save_adapter(model, tmp_path / "adapter", **patterns)
    wanted = compute_log_probs(base, folder)
    result = repair_adapter(folder, "vllm", tmp_path / "out", str(base))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (result.form, config["use_rslora"], config["rank_pattern"]) == ("adapter", False, config["alpha_pattern"])
    assert (wanted - compute_log_probs(base, tmp_path / "out")).abs().max() < 1e-4


@pytest.fixture(params=[False, True], ids=["own-head", "tied"])
def gguf_base(request, tmp_path, monkeypatch, tiny_llama, tiny_tokenizer):
    """A base as a GGUF file, and the model in it."""
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    settings = {"initializer_range": 0.2, "tie_word_embeddings": request.param}
    file = write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer, **settings)
    return file, tf.AutoModelForCausalLM.from_pretrained(get_or_make_hf_folder_and_seconds(file)[0])


SETTINGS = {
    "adapter": ({}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 2}}),
    "merged": ({"use_dora": True}, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(("form", "number"), [("adapter", 0), ("adapter", 1), ("merged", 0), ("merged", 1)])
def test_file_for_llama_cpp(gguf_base, tmp_path, form, number):
    """ggml-org/llama.cpp's converter ignores rsLoRA and patterns; it adds no DoRA and no trained embedding."""
    file, model = gguf_base
    modules = {"target_modules": ["q_proj", "up_proj"]}
    folder = save_adapter(model, tmp_path / "adapter", **modules, **SETTINGS[form][number])
    edit_tensors(folder, lambda t: {k.replace("model.layers", "_orig_mod.model.layers"): v for k, v in t.items()})
    result = repair_adapter(folder, "llama.cpp", tmp_path / "out", str(file))
    assert (result.form, result.proof.passed, result.proof.cause) == (form, True, "applied"), result


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_files_for_ollama_with_an_adapter_of_the_head(gguf_base, tmp_path):
    """huggingface/peft#2018: where the base ties its head, the embedding stays as it is."""
    file, model = gguf_base
    folder = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    rename(folder, "base_model.", "module.base_model.")
    result = repair_adapter(folder, "ollama", tmp_path / "out", str(file))
    assert (result.proof.passed, {"Modelfile", "model.gguf"} <= {*result.files}) == (True, True), result


def test_several_adapters_need_a_choice(adapter_copy, tmp_path):
    base, folder = adapter_copy()
    FAULTS["two-adapters"][3](folder)
    with pytest.raises(UsageError, match="'a', 'b'"):
        repair_adapter(folder, "peft", tmp_path / "out", str(base), RepairAnswers("c"))


def test_unknown_engine_is_wrong_use(slimtune, adapter_copy, tmp_path):
    base, folder = adapter_copy()
    done = slimtune("repair", folder, "--for", "vlm", "--base", base, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "'vllm'" in done.stderr


def test_folder_with_files_is_wrong_use(slimtune, adapter_copy):
    base, folder = adapter_copy()
    done = slimtune("repair", folder, "--for", "peft", "--base", base, "--out", folder)
    assert done.exit_code == 2


def test_command_prints_what_was_mended(slimtune, adapter_copy, tmp_path):
    base, folder = adapter_copy()
    rename(folder, "base_model.model.", "")
    done = slimtune("repair", folder, "--for", "peft", "--base", base, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert ([m["code"] for m in result["mended"]], result["form"]) == (["key-prefix"], "adapter")
