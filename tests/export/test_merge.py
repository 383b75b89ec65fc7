"""A merged checkpoint is the trained model in plain transformers, whole or absent."""

import errno
import hashlib
import json
import os
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers as tf
from hand_run import make_run
from peft import LoraConfig as TheirConfig
from peft import PeftModel as TheirModel
from peft import get_peft_model as their_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimtune.export.merge as module
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.adapters.peft_model import PeftModel
from slimtune.core.foundation.files import atomic_folder
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.errors import AdapterError, RunError, UsageError
from slimtune.export.manifest import read_export_manifest
from slimtune.export.merge import merge as merge_run
from slimtune.methods.lora.lora_modules import LinearLora


def merge(*args: Any, **options: Any) -> dict[str, Any]:
    """Return what `slimtune merge --json` prints."""
    return to_json_dict(merge_run(*args, **options))


TEXT = "Define hope. Desire and expectation rolled into one."
SHARD_BYTES = "slimtune.export.merged_weights.MIN_SHARD_BYTES"


def log_p(model, folder) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def adapter_log_p(run, base, dtype=torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return log_p(PeftModel.from_pretrained(model, run / "adapter"), base)


def merged_log_p(folder, **options) -> torch.Tensor:
    return log_p(AutoModelForCausalLM.from_pretrained(folder, **options), folder)


def load_weights(folder) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def make_base(tmp_path, tiny_llama, tiny_tokenizer):
    def make(model=None, **config):
        (model or tiny_llama(**config)).save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


# --- the same model --------------------------------------------------------------------------------------------------

TARGETS = {
    "all-linear": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "whole head": {"modules_to_save": ["lm_head"]},
}
TIED = [("all-linear", True), ("head", True), ("head", False), ("embedding", True), ("whole head", True)]


@pytest.mark.parametrize(("target", "tied"), TIED)
def test_plain_transformers_loads_the_trained_model(tmp_path, make_base, target, tied):
    base, out = make_base(tie_word_embeddings=tied), tmp_path / "merged"
    run = make_run(tmp_path / "run", base, model={"dtype": "float64"}, method=TARGETS[target])
    result = merge(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.float64)
    assert (log_p(model, out) - adapter_log_p(run, base, torch.float64)).abs().max() < 1e-9
    assert result["mean_difference"] <= result["max_difference"] < 1e-9 < result["effect"]
    assert (result["dtype"], result["out"], result["run"]) == ("float64", str(out), str(run))
    assert result["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["positions"] > 100
    assert model.config.tie_word_embeddings is (tied and target == "all-linear")
    if "head" in target:
        embeddings = load_weights(base)["model.embed_tokens.weight"]
        assert torch.equal(model.get_input_embeddings().weight, embeddings.double())


def test_config_has_the_rope_theta_that_transformers_4_and_mlx_lm_read(tmp_path, make_base):
    base = make_base(rope_parameters={"rope_type": "default", "rope_theta": 100_000.0})
    merge(make_run(tmp_path / "run", base), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0


SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "GPT2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=256),
    "Gemma3Text": lambda: tf.Gemma3TextConfig(**MORE, head_dim=8, sliding_window=8),
    "Qwen2": lambda: tf.Qwen2Config(**MORE, tie_word_embeddings=True),
    "Mixtral": lambda: tf.MixtralConfig(**MORE, num_local_experts=4),  # experts: stacked in memory, apart in the file
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, make_base, name, monkeypatch):
    torch.manual_seed(0)
    base, out = make_base(AutoModelForCausalLM.from_config(OTHERS[name]())), tmp_path / "merged"
    # torch multiplies grouped experts in 32 bits at most
    dtype, near = (torch.float32, 2e-5) if name == "Mixtral" else (torch.float64, 1e-9)
    attention = {"target_modules": ["c_attn" if name == "GPT2" else "q_proj"]}
    run = make_run(tmp_path / "run", base, model={"dtype": str(dtype)[6:]}, method=attention)
    monkeypatch.setattr(SHARD_BYTES, 60_000)
    result = merge(run, out)
    assert (merged_log_p(out) - adapter_log_p(run, base, dtype)).abs().max() < near
    assert result["max_difference"] < near < result["effect"]
    assert load_weights(out).keys() == load_weights(base).keys()


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "trainable_token_indices": [300, 7]}),
        ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    ],
    ids=["new tokens", "biases"],
)
def test_trained_tokens_and_biases(tmp_path, make_base, config, method):
    base = make_base(**config)
    run = make_run(tmp_path / "run", base, model={"dtype": "float64"}, method=method)
    merge(run, tmp_path / "merged")
    assert (merged_log_p(tmp_path / "merged") - adapter_log_p(run, base, torch.float64)).abs().max() < 1e-9
    merged, before = load_weights(tmp_path / "merged"), load_weights(base)
    if "bias" in method:
        names = [f"model.layers.1.self_attn.{name}.bias" for name in ("q_proj", "v_proj")]
        assert not any(torch.equal(merged[n], before[n].double()) for n in names)
    else:
        changed = merged["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]
        assert changed.any(1).nonzero()[:, 0].tolist() == [7, 300]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantized_base_gives_16_bits(tmp_path, tiny_llama, tiny_tokenizer, kind):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    tiny_llama(tie_word_embeddings=True, hidden_size=128, intermediate_size=128).save_pretrained(plain)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} if kind == "4bit" else {}
    quantization = tf.BitsAndBytesConfig(**{f"load_in_{kind}": True}, **four)
    options = {"quantization_config": quantization, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(packed)
    for folder in (plain, packed):
        tiny_tokenizer().save_pretrained(folder)
    run = make_run(tmp_path / "run", plain, size=0.3, method={"target_modules": ["o_proj", "up_proj"]})
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(packed)}))
    result = merge(run / "adapter", tmp_path / "merged")
    assert result["dtype"] == "bfloat16"
    assert result["mean_difference"] < 0.02 < 0.2 < result["effect"]
    merged, given = load_weights(tmp_path / "merged"), load_weights(plain)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in given.items()}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    unchanged = "model.layers.0.mlp.down_proj.weight"
    assert 0 < (merged[unchanged].float() - given[unchanged]).abs().mean() < 0.1 * given[unchanged].abs().mean()
    assert (merged_log_p(tmp_path / "merged") - adapter_log_p(run, packed)).abs().mean() < 0.02


# --- dtypes and rounding ---------------------------------------------------------------------------------------------


def test_dtype(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "auto"})
    (run / "result.json").write_text(json.dumps({"dtype": "bfloat16"}))
    for dtype, expected in {"auto": "bfloat16", "float32": "float32", "fp16": "float16"}.items():
        assert merge(run, tmp_path / dtype, dtype=dtype)["dtype"] == expected
        assert {t.dtype for t in load_weights(tmp_path / dtype).values()} == {getattr(torch, expected)}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == expected


def test_base_is_rounded_as_in_training(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "bfloat16"}, method={"target_modules": ["q_proj"]})
    merge(run, tmp_path / "merged", dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    merged, base = load_weights(tmp_path / "merged")[name], load_weights(tiny_folder)[name]
    assert torch.equal(merged, base.bfloat16().float())
    assert not torch.equal(merged, base)


def test_adapter_folder_is_merged_in_its_bases_dtype(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    assert merge(run / "adapter", tmp_path / "a")["dtype"] == "float32"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tiny_folder)
    assert merge(run / "adapter", tmp_path / "b")["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_models_give_the_same_weights(tmp_path, tiny_folder, monkeypatch, dtype):
    """A large base in another dtype than the run's is rounded on the disk; the check computes in the run's dtype."""
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "bfloat16"})
    monkeypatch.setattr(module, "record_linear_layer_inputs", lambda *_: {})
    merge(run, tmp_path / "small", dtype=dtype)
    monkeypatch.setattr(module, "SMALL_MODEL", 0)
    monkeypatch.setattr(SHARD_BYTES, 40_000)
    assert 0 < merge(run, tmp_path / "large", dtype=dtype)["mean_difference"] < 0.1
    small, large = load_weights(tmp_path / "small"), load_weights(tmp_path / "large")
    assert small.keys() == large.keys()
    assert all(torch.equal(small[n], large[n]) for n in small)
    assert (merged_log_p(tmp_path / "large", dtype=torch.float32) - adapter_log_p(run, tiny_folder)).abs().mean() < 0.05


def test_rounding_with_rows_is_nearer(tmp_path, make_base, tiny_llama, monkeypatch):
    run = make_run(tmp_path / "run", make_base(tiny_llama().bfloat16()), model={"dtype": "bfloat16"})
    monkeypatch.setattr("slimtune.export.merged_weights.MIN_TOKENS", 1)
    with_rows = merge(run, tmp_path / "rows")
    monkeypatch.setattr(module, "record_linear_layer_inputs", lambda *_: {})
    assert with_rows["mean_difference"] < merge(run, tmp_path / "nearest")["mean_difference"]


def test_gguf_in_16_bits_is_rounded_with_the_rows_of_the_run(tmp_path, make_base, tiny_llama, monkeypatch):
    """A change of less than half a step of the base's own values is not lost: its effect arrives."""
    run = make_run(tmp_path / "run", make_base(tiny_llama().bfloat16()), size=0.02, model={"dtype": "bfloat16"})
    found = {}
    monkeypatch.setattr("slimtune.export.merged_weights.MIN_TOKENS", 1)
    monkeypatch.setattr(
        module.llama_cpp_tools, "convert_hf_to_gguf", lambda path, file, kind: found.update({kind: load_weights(path)})
    )
    loaded = module.load_run_for_export(run)
    for precision in ("f32", "f16"):
        module.write_merged_gguf(loaded, run, tmp_path / "model.gguf", precision)
    name = "model.layers.0.mlp.up_proj"
    inputs = module.record_linear_layer_inputs(loaded.model, loaded.recipe, loaded.base.tokenizer)[name]
    exact, rounded = (found[precision][f"{name}.weight"].float() for precision in ("f32", "f16"))
    assert found["f16"][f"{name}.weight"].dtype == torch.float16
    assert not torch.equal(exact, exact.half().float())
    error, nearest = (((w - exact) @ inputs.float().t()).norm() for w in (rounded, exact.half().float()))
    assert error < 0.9 * nearest


# --- the files -------------------------------------------------------------------------------------------------------


def test_shards_and_index_as_in_transformers(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(SHARD_BYTES, 40_000)
    run, out, theirs = make_run(tmp_path / "run", tiny_folder), tmp_path / "merged", tmp_path / "theirs"
    merge(run, out)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(theirs, max_shard_size=40_000)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    ours, expected = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, theirs))
    assert ours["metadata"] == expected["metadata"]
    assert ours["weight_map"].keys() == expected["weight_map"].keys()
    assert all(name in load_file(out / file) for name, file in ours["weight_map"].items())


def test_tokenizer_and_generation_settings(tmp_path, tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.update(temperature=0.3, top_p=0.5)  # without do_sample, as some checkpoints have it
    (tiny_folder / "generation_config.json").write_text(model.generation_config.to_json_string())
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    run = make_run(tmp_path / "run", tiny_folder, data={"chat_template": str(template)})
    merge(run, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi<|im_end|>"
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.3, 0.5, True)


def test_model_card_and_manifest(tmp_path, tiny_folder, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_folder)
    result = merge(run, tmp_path / "merged")
    text, manifest = (tmp_path / "merged" / "README.md").read_text(), read_export_manifest(tmp_path / "merged")
    assert text.startswith("---\n")
    assert "base_model:" not in text  # a local path would be a dead link on the Hub
    assert f"over {result['positions']} positions" in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()
    assert (manifest.kind, manifest.run, manifest.values["dtype"]) == ("merged", run.resolve(), "float32")
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert manifest.values["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
    assert re.fullmatch("[0-9a-f]{16}", manifest.values["fingerprint"])


# --- refusals: an error, and nothing where `out` would be ------------------------------------------------------------


def refused(kind, run, out, existing=(), **options):
    with pytest.raises(kind) as caught:
        merge(run, out, **options)
    assert not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    if out.is_dir():
        assert sorted(p.name for p in out.iterdir()) == list(existing)
    else:
        assert out.is_file() or not out.exists()
    return caught.value


def test_wrong_use(tmp_path, tiny_folder, monkeypatch):
    run, out = make_run(tmp_path / "run", tiny_folder), tmp_path / "merged"
    monkeypatch.setattr(module, "load_run", None)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "'mine.txt'" in refused(UsageError, run, out, existing=["mine.txt"]).message
    assert "is a file" in refused(UsageError, run, out / "mine.txt").message
    assert "'bfloat16'" in refused(UsageError, run, tmp_path / "new", dtype="bfloat61").message
    assert "'run'" in refused(UsageError, tmp_path / "rum", tmp_path / "new").message


def test_nan_and_overflow(tmp_path, tiny_folder):
    def spoil(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    error = refused(AdapterError, make_run(tmp_path / "run", tiny_folder, change=spoil), tmp_path / "merged")
    assert "contain NaN or Inf" in error.message
    assert "checkpoint" in error.hint
    run = make_run(tmp_path / "large", tiny_folder, size=900.0, method={"target_modules": ["v_proj"]})
    error = refused(AdapterError, run, tmp_path / "merged", dtype="float16")
    assert re.search(r"model\.layers\.0\.self_attn\.v_proj\.weight .*float16", error.message)
    assert "bfloat16" in error.hint


def test_method_without_a_merge(tmp_path, tiny_folder, monkeypatch):
    def refuse(self, weight, bias):
        raise MergeUnsupported("strange")

    run = make_run(tmp_path / "run", tiny_folder)
    monkeypatch.setattr(LinearLora, "merge_into", refuse)
    error = refused(AdapterError, run, tmp_path / "merged")
    assert "strange" in error.message
    assert error.hint


def test_wrong_merge_is_noticed(tmp_path, tiny_folder, monkeypatch):
    run = make_run(tmp_path / "run", tiny_folder)
    right = LinearLora.merge_into
    monkeypatch.setattr(LinearLora, "merge_into", lambda self, W, b: (right(self, W, b)[0] * 1.01, b))
    assert refused(RunError, run, tmp_path / "merged").code == "merge-differs"
    monkeypatch.setattr(LinearLora, "merge_into", lambda self, W, b: (W.clone(), b))
    error = refused(RunError, run, tmp_path / "merged", dtype="bfloat16")
    assert error.code == "merge-differs"
    assert "--dtype float32" in error.hint


def test_full_disk_leaves_nothing(tmp_path, tiny_folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = make_run(tmp_path / "run", tiny_folder)
    monkeypatch.setattr(module, "save_merged_weights", fail)
    assert refused(RunError, run, tmp_path / "merged").code == "disk-full"


def test_second_merge_into_one_folder_is_refused(tmp_path, make_base):
    run, out = make_run(tmp_path / "run", make_base()), tmp_path / "merged"
    with atomic_folder(out) as folder:
        (folder / "first").touch()
        with pytest.raises(UsageError, match=f"process .*{out}"):
            merge(run, out)
    assert [p.name for p in out.iterdir()] == ["first"]


def test_tokenizer_model_is_copied(tmp_path, make_base):
    base = make_base()
    (base / "tokenizer.model").write_bytes(b"\nsentencepiece")
    merge(make_run(tmp_path / "run", base), tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"\nsentencepiece"


# --- what merging costs compared with PEFT on SmolLM2-135M: |Δ log p| and KL to the adapter on its base, in nats -----
#
# All log-probabilities are computed in float32, so the figures are those of the weights: `pytest -s` prints them.

TEXTS = [
    "Define hope. Desire and expectation rolled into one.",
    "The capital of France is Paris, a city of about two million people.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Marriage: the state of a community consisting of a master, a mistress and two slaves, making in all, two.",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, smollm2_folder):
    """An adapter that PEFT wrote; its changes are about as large as a few dozen steps make them."""
    folder = tmp_path_factory.mktemp("peft")
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    config = TheirConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, draws = their_model(base, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.06, generator=draws)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def log_p_of_texts(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all positions: log p of every token `(n, vocabulary)`, and the ids of those that come next `(n,)`."""
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    found = [model.float()(row, use_cache=False).logits[0, :-1].double().log_softmax(-1) for row in rows]
    return torch.cat(found), torch.cat([row[0, 1:] for row in rows])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merge_costs_no_more_than_pefts(tmp_path, smollm2_folder, adapter, dtype):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)

    def base():
        return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=dtype)

    run = make_run(tmp_path / "run", smollm2_folder, model={"dtype": str(dtype).removeprefix("torch.")})
    (run / "adapter").rename(tmp_path / "unused")
    (run / "adapter").symlink_to(adapter)
    merge(run, tmp_path / "merged")
    adapted, following = log_p_of_texts(PeftModel.from_pretrained(base(), adapter), tokenizer)
    models = {
        "slimtune": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "PEFT": lambda: TheirModel.from_pretrained(base(), str(adapter)).merge_and_unload(),
        "no adapter": base,
    }
    print(f"\n{dtype}, {len(following)} positions")
    found = {}
    for name, load in models.items():
        merged, _ = log_p_of_texts(load(), tokenizer)
        own = (merged - adapted).gather(-1, following[:, None]).abs()
        kl = (adapted.exp() * (adapted - merged)).sum(-1).mean().item()
        found[name] = {"mean": own.mean().item(), "max": own.max().item(), "kl": kl}
        print(f"{name:>10}: mean {own.mean():.3g}, max {own.max():.3g}, KL {kl:.3g}")
    unadapted = found["no adapter"]["mean"]
    assert unadapted > 0.3
    if dtype == torch.float32:
        assert found["slimtune"]["mean"] <= 2 * found["PEFT"]["mean"]
        assert found["slimtune"]["max"] <= 2 * max(found["PEFT"]["max"], 1e-6)
    else:
        # Of weights in 8 bits: 0.02 nats hold for the divergence of what is said, not for every log-probability.
        assert found["slimtune"]["kl"] < 0.02
        assert found["slimtune"]["mean"] <= 1.1 * found["PEFT"]["mean"]
