"""A merged checkpoint: the trained model in plain transformers, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import namedtuple
from importlib.util import find_spec

import pytest
import torch
import transformers as tf
from hand_run import make_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimtune.export.merge as room
from slimtune.adapters.base import MergeUnsupported
from slimtune.adapters.model import PeftModel
from slimtune.errors import AdapterError, RunError, UsageError
from slimtune.export.folder import read_note
from slimtune.export.merge import merge
from slimtune.export.shards import Shards
from slimtune.methods.lora import LinearLora

TEXT = "Define hope. Desire and expectation rolled into one."


def log_p(model, folder) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def adapter_of(run, base, dtype=torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return log_p(PeftModel.from_pretrained(model, run / "adapter"), base)


def left_beside(out) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


TARGETS = {
    "all-linear": {},
    "the tied head": {"target_modules": ["q_proj", "lm_head"]},
    "the tied embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a head trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("method", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_plain_transformers_loads_the_trained_model(tmp_path, tiny_llama, tiny_tokenizer, method, tied):
    base, out = tmp_path / "base", tmp_path / "merged"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    run = make_run(tmp_path / "run", base, model={"dtype": "float64"}, method=method)
    found = merge(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float64
    assert (log_p(model, out) - adapter_of(run, base, torch.float64)).abs().max() < 1e-9
    assert found["max_difference"] < 1e-9 < found["effect"]
    assert found["mean_difference"] <= found["max_difference"]
    assert (found["dtype"], found["out"], found["run"]) == ("float64", str(out), str(run))
    assert found["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["positions"] > 100
    head_changed = method.get("target_modules", ["lm_head"])[-1] != "v_proj" and bool(method)
    assert model.config.tie_word_embeddings is (tied and not head_changed and "embed_tokens" not in str(method))
    if head_changed:
        wanted = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.get_input_embeddings().weight, wanted.double())


SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "GPT2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=256),
    "Gemma3Text": lambda: tf.Gemma3TextConfig(**MORE, head_dim=8, sliding_window=8),
    "Qwen2": lambda: tf.Qwen2Config(**MORE, tie_word_embeddings=True),
    "Mixtral": lambda: tf.MixtralConfig(**MORE, num_local_experts=4),  # its experts are stacked here, apart in the file
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_architectures_come_back_as_trained(tmp_path, tiny_tokenizer, config):
    base, out = tmp_path / "base", tmp_path / "merged"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    kind = config().model_type
    attention = {"target_modules": ["c_attn" if kind == "gpt2" else "q_proj"]}
    # torch multiplies grouped experts in 32 bits at most
    dtype, near = (torch.float32, 2e-5) if kind == "mixtral" else (torch.float64, 1e-9)
    run = make_run(tmp_path / "run", base, model={"dtype": str(dtype)[6:]}, method=attention)
    found = merge(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (log_p(model, out) - adapter_of(run, base, dtype)).abs().max() < near
    assert found["max_difference"] < near < found["effect"]
    assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))


def test_fp32_agrees_tightly(tmp_path, tiny_folder):
    run, out = make_run(tmp_path / "run", tiny_folder), tmp_path / "merged"
    found = merge(run, out)
    assert found["max_difference"] < 2e-5
    assert (log_p(AutoModelForCausalLM.from_pretrained(out), out) - adapter_of(run, tiny_folder)).abs().max() < 2e-5


def test_auto_is_the_dtype_that_the_run_had_and_another_one_can_be_asked_for(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "auto"})
    (run / "result.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert merge(run, tmp_path / "auto")["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "auto" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, dtype in {"float32": torch.float32, "fp16": torch.float16}.items():
        found = merge(run, tmp_path / name, dtype=name)
        assert found["dtype"] == str(dtype).removeprefix("torch.")
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}


def test_the_base_is_taken_as_it_was_trained_on(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "bfloat16"}, method={"target_modules": ["q_proj"]})
    merge(run, tmp_path / "merged", dtype="float32")
    held, base = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", tiny_folder))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(held[name], base[name].bfloat16().float())
    assert not torch.equal(held[name], base[name])


def test_an_adapter_folder_is_merged_in_the_dtype_its_base_is_stored_in(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    assert merge(run / "adapter", tmp_path / "a")["dtype"] == "float32"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tiny_folder)
    assert merge(run / "adapter", tmp_path / "b")["dtype"] == "bfloat16"


def test_tokenizer_chat_template_and_generation_settings_come_along(tmp_path, tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.update(temperature=0.3, top_p=0.5)  # without do_sample, as some checkpoints have it
    (tiny_folder / "generation_config.json").write_text(model.generation_config.to_json_string())
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    run = make_run(tmp_path / "run", tiny_folder, data={"chat_template": str(template)})
    merge(run, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<|im_start|>Hi<|im_end|>"
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.3, 0.5, True)


def test_the_card_says_what_it_is_and_its_code_runs(tmp_path, tiny_folder, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_folder)
    found = merge(run, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "base_model:" not in text  # a path of this disk would be a dead link on the Hub
    assert f"| base | `{tiny_folder}` |" in text
    assert '"r": 4' in text
    assert f"over {found['positions']} positions" in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()


def test_a_large_model_is_proven_in_its_own_dtype_on_the_files_that_were_written(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(room, "SMALL", 0)
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "bfloat16"})
    found = merge(run, tmp_path / "merged")
    assert 0 < found["mean_difference"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (log_p(model, tmp_path / "merged") - adapter_of(run, tiny_folder)).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_the_same_however_large_the_model_is(tmp_path, tiny_folder, monkeypatch, dtype):
    run = make_run(tmp_path / "run", tiny_folder, model={"dtype": "bfloat16"})
    monkeypatch.setattr(room, "rounding_for", lambda *_: None)  # large models are rounded number by number
    merge(run, tmp_path / "small", dtype=dtype)
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "SHARD", 40_000)
    merge(run, tmp_path / "large", dtype=dtype)
    files = sorted((tmp_path / "large").glob("*.safetensors"))
    small = load_file(tmp_path / "small" / "model.safetensors")
    large = {n: t for f in files for n, t in load_file(f).items()}
    assert small.keys() == large.keys()
    assert all(torch.equal(small[n], large[n]) for n in small)


def test_several_files_have_the_names_and_the_index_that_transformers_gives(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(room, "SHARD", 40_000)
    run, out = make_run(tmp_path / "run", tiny_folder), tmp_path / "merged"
    merge(run, out)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "theirs", max_shard_size=40_000)
    wanted = sorted(p.name for p in (tmp_path / "theirs").glob("*.safetensors*"))
    assert sorted(p.name for p in out.glob("*.safetensors*")) == wanted
    assert len(wanted) > 2
    for name in wanted[:-1]:
        assert load_file(out / name).keys() == load_file(tmp_path / "theirs" / name).keys()
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((tmp_path / "theirs" / index).read_text())


def test_rows_of_new_tokens_are_merged_into_tied_embeddings(tmp_path, tiny_llama, tiny_tokenizer):
    base, out = tmp_path / "base", tmp_path / "merged"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    method = {"target_modules": ["q_proj"], "trainable_token_indices": [300, 7]}
    run = make_run(tmp_path / "run", base, model={"dtype": "float64"}, method=method)
    merge(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (log_p(model, out) - adapter_of(run, base, torch.float64)).abs().max() < 1e-9
    rows, before = (m.get_input_embeddings().weight for m in (model, AutoModelForCausalLM.from_pretrained(base)))
    changed = (rows != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [7, 300]


def test_trained_biases_are_merged(tmp_path, tiny_llama, tiny_tokenizer):
    base, out = tmp_path / "base", tmp_path / "merged"
    tiny_llama(attention_bias=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    method = {"target_modules": ["q_proj"], "bias": "all"}
    run = make_run(tmp_path / "run", base, model={"dtype": "float64"}, method=method)
    merge(run, out)
    held, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    for name in ("q_proj", "v_proj"):
        at = f"model.layers.1.self_attn.{name}.bias"
        assert not torch.equal(held[at], before[at].double())
    assert (
        log_p(AutoModelForCausalLM.from_pretrained(out), out) - adapter_of(run, base, torch.float64)
    ).abs().max() < 1e-9


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_out_of_a_quantized_base_comes_a_checkpoint_in_16_bits(tmp_path, tiny_llama, tiny_tokenizer, kind):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    tiny_llama(tie_word_embeddings=True, hidden_size=128, intermediate_size=128).save_pretrained(plain)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    wanted = tf.BitsAndBytesConfig(**{f"load_in_{kind}": True}, **(four if kind == "4bit" else {}))
    options = {"quantization_config": wanted, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(packed)
    for folder in (plain, packed):
        tiny_tokenizer().save_pretrained(folder)
    targets = {"target_modules": ["o_proj", "up_proj"]}
    adapter = make_run(tmp_path / "run", plain, size=0.3, method=targets) / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(packed)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = merge(adapter, tmp_path / "merged")
    assert found["dtype"] == "bfloat16"
    assert found["mean_difference"] < 0.02 < 0.2 < found["effect"]
    held, given = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", plain))
    assert {n: t.shape for n, t in held.items()} == {n: t.shape for n, t in given.items()}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    left = "model.layers.0.mlp.down_proj.weight"
    assert 0 < (held[left].float() - given[left]).abs().mean() < 0.1 * given[left].abs().mean()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (log_p(model, tmp_path / "merged") - adapter_of(tmp_path / "run", packed)).abs().mean() < 0.02


def test_a_note_says_what_it_was_made_of(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    merge(run, tmp_path / "merged")
    note = read_note(tmp_path / "merged")
    assert note is not None
    assert (note["kind"], note["run"], note["dtype"]) == ("merged", run.resolve(), "float32")
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert note["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
    assert re.fullmatch("[0-9a-f]{16}", note["fingerprint"])


def refused(kind, run, out, held=(), **options):
    """The error, its exit code seen, and nothing left where `out` would be."""
    with pytest.raises(kind) as caught:
        merge(run, out, **options)
    assert caught.value.exit_code == (2 if kind is UsageError else 1)
    assert left_beside(out) == []
    assert sorted(p.name for p in out.iterdir()) == list(held) if out.is_dir() else not out.exists() or out.is_file()
    return caught.value


def test_wrong_use_is_refused_before_the_model_is_loaded(tmp_path, tiny_folder, monkeypatch):
    run, out = make_run(tmp_path / "run", tiny_folder), tmp_path / "merged"
    monkeypatch.setattr(room, "load_run", None)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    said = refused(UsageError, run, out, held=["mine.txt"])
    assert "already holds files: 'mine.txt'" in said.message
    assert said.hint == "give another --out"
    assert "is a file" in refused(UsageError, run, out / "mine.txt").message
    assert "did you mean 'bfloat16'?" in refused(UsageError, run, tmp_path / "new", dtype="bfloat61").message
    assert "did you mean 'run'?" in refused(UsageError, tmp_path / "rum", tmp_path / "new").message


def test_an_empty_folder_is_taken_and_missing_parents_are_made(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        if out.name == "empty":
            out.mkdir()
        merge(run, out)
        assert (out / "model.safetensors").is_file()
        assert oct(out.stat().st_mode)[-3:] == "755"


def test_an_adapter_of_no_numbers_is_refused(tmp_path, tiny_folder):
    def spoil(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    said = refused(AdapterError, make_run(tmp_path / "run", tiny_folder, change=spoil), tmp_path / "merged")
    assert "not finite after merging" in said.message
    assert "older checkpoint" in said.hint


def test_weights_that_16_bits_cannot_hold_are_refused_by_name(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, size=900.0, method={"target_modules": ["v_proj"]})
    said = refused(AdapterError, run, tmp_path / "merged", dtype="float16")
    assert "model.layers.0.self_attn.v_proj.weight holds numbers that float16 cannot hold" in said.message
    assert said.expected == "numbers up to 6.55e+04"
    assert "bfloat16" in said.hint


def test_a_method_that_cannot_be_merged_says_the_way_out(tmp_path, tiny_folder, monkeypatch):
    def refuse(self, weight, bias):
        raise MergeUnsupported("this change is no change of a weight")

    run = make_run(tmp_path / "run", tiny_folder)
    monkeypatch.setattr(LinearLora, "merged", refuse)
    said = refused(AdapterError, run, tmp_path / "merged")
    assert "cannot be merged: this change is no change of a weight" in said.message
    assert "use it beside its base" in said.hint


def test_a_merge_that_is_not_the_trained_model_is_noticed(tmp_path, tiny_folder, monkeypatch):
    run = make_run(tmp_path / "run", tiny_folder)
    whole = LinearLora.merged
    monkeypatch.setattr(LinearLora, "merged", lambda self, W, b: (whole(self, W, b)[0] * 1.01, b))
    assert "is not the trained one" in refused(RunError, run, tmp_path / "merged").message
    monkeypatch.setattr(LinearLora, "merged", lambda self, W, b: (W.clone(), b))
    said = refused(RunError, run, tmp_path / "merged", dtype="bfloat16")
    assert "--dtype float32" in said.hint


def test_a_file_that_lost_a_tensor_is_noticed(tmp_path, tiny_folder, monkeypatch):
    whole = Shards.write

    def lossy(self, name, tensor):
        if not name.endswith("norm.weight"):
            whole(self, name, tensor)

    run = make_run(tmp_path / "run", tiny_folder)
    monkeypatch.setattr(Shards, "write", lossy)
    assert "the saved checkpoint holds" in refused(RunError, run, tmp_path / "merged").message


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_leaves_nothing(tmp_path, tiny_folder, monkeypatch, when):
    run = make_run(tmp_path / "run", tiny_folder)
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 4096))
    else:

        def full(self, name, tensor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Shards, "write", full)
    said = refused(RunError, run, tmp_path / "merged")
    assert "the disk is full" in said.message
    assert "free some space" in said.hint
