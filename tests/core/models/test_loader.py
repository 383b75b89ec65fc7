import json
import logging
import os
import shutil
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from slimtune.core.models import base_config
from slimtune.core.models.base_config import load_convertible_base_config
from slimtune.core.models.load_errors import silence_and_translate_load_errors
from slimtune.core.models.loader import load_base, load_tokenizer
from slimtune.errors import ModelError, RunError, UsageError


def load(spec, **options):
    return load_base(str(spec), **{"dtype": "fp32", "device": "cpu", **options})


def assert_refused(spec, kind, *words, **options):
    with pytest.raises(kind) as caught:
        load(spec, **options)
    for word in words:
        assert word in str(caught.value)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_folder(tiny_folder, tiny_llama, capsys):
    base = load(tiny_folder)
    assert capsys.readouterr() == ("", "")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, tiny_llama()(ids).logits)
    assert not base.model.training
    assert (base.dtype, base.device, base.source.kind) == (torch.float32, torch.device("cpu"), "folder")
    assert base.prepare_seconds == 0 < base.load_seconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_attention(tiny_folder, dtype):
    base = load(tiny_folder, dtype=dtype, attn_implementation="eager")
    assert {p.dtype for p in base.model.parameters()} == {dtype}
    assert base.model.config._attn_implementation == "eager"
    default = load(tiny_folder)
    assert default.model.config._attn_implementation == "sdpa"
    assert default.fingerprint == base.fingerprint


def test_config_and_tokenizer_need_no_weights(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    assert load_convertible_base_config(str(tiny_folder)).hidden_size == 32
    assert load_tokenizer(str(tiny_folder)).eos_token == "<|im_end|>"
    assert_refused(tiny_folder, ModelError, "model.safetensors")


def test_libraries_are_silent(monkeypatch, capsys):
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with silence_and_translate_load_errors("x"):
        print("text")
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
        assert not transformers_logging.is_progress_bar_enabled()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ
    assert capsys.readouterr() == ("", "text\n")


# --- remote code ------------------------------------------------------------------------------------------------------


def test_warnings_of_libraries_that_slimtune_answers_itself_are_silent(tiny_folder, capfd, caplog):
    tokenizer = load_tokenizer(str(tiny_folder))
    tokenizer.model_max_length = 8
    capfd.readouterr()
    assert len(tokenizer("abc " * 20)["input_ids"]) == 80
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for message in ("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "something else"):
        logger.error(message.replace("%s", "no kernels"))
    assert capfd.readouterr().err == ""
    assert len(caplog.messages) == 1


def test_remote_code(tiny_folder, monkeypatch, tmp_path):
    (tiny_folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(tiny_folder, model_type="own", auto_map=code, architectures=["OwnModel"])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing may be asked on the terminal"))
    for function in (load, load_tokenizer, load_convertible_base_config):
        with pytest.raises(UsageError, match=r"(?s)--trust-remote-code"):
            function(str(tiny_folder))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert type(load(tiny_folder, trust_remote_code=True).model).__name__ == "OwnModel"


def test_remote_model_of_known_config(tiny_folder):
    edit_config(tiny_folder, auto_map={"AutoModelForTokenClassification": "own.Own"}, model_type="mamba")
    assert_refused(tiny_folder, UsageError, "--trust-remote-code", task="TOKEN_CLS")


def test_unused_remote_code(tiny_folder):
    edit_config(tiny_folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    assert type(load(tiny_folder).model).__module__.startswith("transformers.")


# --- damaged folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "of_tomorrow"}, ["of_tomorrow", "pip install -U transformers"]),
        ({"num_hidden_layers": 3}, ["lacks 9 weights", "layers.2", "filled at random"]),
        ({"intermediate_size": 96}, ["other shapes than its config.json says"]),
        ({"hidden_act": "sillu"}, ["hidden_act is 'sillu'; did you mean 'silu'?"]),
        ({"hidden_act": 3}, ["hidden_act = 3", "str"]),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}}, ["cannot be loaded", "nope"]),
        ({"text_config": {"a": 1}}, ["text_config"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers = 1000000", "from 1 to 2,000"]),
        ({"max_position_embeddings": -1}, ["max_position_embeddings = -1"]),
    ],
)
def test_config_does_not_fit(tiny_folder, changes, words):
    edit_config(tiny_folder, **changes)
    assert_refused(tiny_folder, ModelError, *words)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere.safetensors", "/tmp/elsewhere.safetensors"])
def test_index_that_names_other_files(tiny_folder, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tiny_folder, ModelError, "index.json names", name, "safetensors files in that folder")


def test_adapter_beside_a_base(tiny_folder, tiny_llama, tmp_path):
    """transformers would load the base that the adapter names."""
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    weights = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(*s)
               for x, s in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    save_file(weights, tiny_folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other"), "r": 2}
    (tiny_folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError):
        load(tiny_folder)


def test_files_that_only_the_owner_reads(tiny_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith(".safetensors"))  # root reads every file
    assert_refused(tiny_folder, ModelError, "no permission to read 'model.safetensors'", "chmod")


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "x"), ("model_max_length", -5)])
def test_damaged_tokenizer_config(tiny_folder, key, value):
    file = tiny_folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert_refused(tiny_folder, ModelError, "tokenizer", "is damaged", f"{key} is {value!r}")


@pytest.mark.parametrize("name", ["a" * 300, "./" + "a" * 300, "a\udcff", "a\0b"])
def test_names_that_no_file_has(name):
    assert_refused(name, UsageError, "there is no base")


@pytest.mark.parametrize(
    ("file", "size", "words"),
    [("config.json", 9, ["config.json is damaged"]), ("model.safetensors", 5000, ["cannot be loaded", "undamaged"])],
)
def test_damaged_file(tiny_folder, file, size, words):
    (tiny_folder / file).write_bytes((tiny_folder / file).read_bytes()[:size])
    assert_refused(tiny_folder, ModelError, *words)


def test_missing_shard(tiny_folder, tiny_llama):
    (tiny_folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(tiny_folder, max_shard_size="30KB")
    assert load(tiny_folder).model is not None
    shard = sorted(tiny_folder.glob("model-*.safetensors"))[1]
    shutil.move(shard, tiny_folder.parent)
    assert_refused(tiny_folder, ModelError, "cannot be loaded", shard.name)


def test_unused_weights_warn(tiny_folder, caplog):
    edit_config(tiny_folder, num_hidden_layers=1)
    load(tiny_folder)
    assert "'model.layers.1" in caplog.text


def test_no_tokenizer(tiny_folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_folder / file).unlink()
    assert_refused(tiny_folder, ModelError, "tokenizer")


def test_tokenizer_exceeds_embeddings(tiny_folder, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(80)])
    tokenizer.save_pretrained(tiny_folder)
    assert_refused(tiny_folder, ModelError, "ids up to 338", "the model has 320 embeddings")


# --- tasks, pad token, template ---------------------------------------------------------------------------------------


def test_tasks(tiny_folder, caplog):
    base = load(tiny_folder, task="SEQ_CLS")
    assert type(base.model).__name__ == "LlamaForSequenceClassification"
    assert base.model.config.pad_token_id == 0
    assert "'score.weight'" in caplog.text
    assert type(load(tiny_folder, task="TOKEN_CLS").model).__name__ == "LlamaForTokenClassification"
    assert type(load(tiny_folder, task="FEATURE_EXTRACTION").model).__name__ == "LlamaModel"
    assert_refused(tiny_folder, ModelError, "no model for this task", task="SEQ_2_SEQ_LM")
    assert_refused(tiny_folder, UsageError, "did you mean 'SEQ_CLS'?", task="SEQ_CLZ")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"], "<|finetune_right_pad_id|>"),
        (["<pad>"], "<pad>"),
        (["<|PAD_TOKEN|>"], "<|PAD_TOKEN|>"),
        (["[PAD]"], "[PAD]"),
        (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<|image_pad|>", "<|fim_pad|>", "<iPad>"], "<|im_end|>"),
        ([], "<|im_end|>"),
    ],
)
def test_pad_token(tiny_folder, tiny_tokenizer, extra, expected):
    tokenizer = tiny_tokenizer(pad_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.save_pretrained(tiny_folder)
    base = load(tiny_folder)
    assert base.tokenizer.pad_token == expected
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id


def test_no_pad_token(tiny_folder, tiny_tokenizer):
    tiny_tokenizer(pad_token=None, eos_token=None).save_pretrained(tiny_folder)
    assert_refused(tiny_folder, ModelError, "neither a pad token nor an end-of-text token")


def test_chat_template(tiny_folder, tmp_path):
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    for given in (text, file, str(file)):
        tokenizer = load_tokenizer(str(tiny_folder), chat_template=given)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"
    strict = "{{ raise_exception('a system turn, please') }}"  # rendering the data will report the row
    assert load(tiny_folder, chat_template=strict).tokenizer.chat_template == strict


def test_wrong_chat_template(tiny_folder, tmp_path):
    (tmp_path / "chatml.jinja").write_text(" \n")
    missing = tmp_path / "chatlm.jinja"
    assert_refused(tiny_folder, UsageError, "no chat template file", "'chatml.jinja'?", chat_template=missing)
    assert_refused(tiny_folder, UsageError, "is empty", chat_template=tmp_path / "chatml.jinja")
    assert_refused(tiny_folder, UsageError, "cannot be read", chat_template=tmp_path)
    assert_refused(tiny_folder, UsageError, "not valid Jinja", "line 2", chat_template="{{ 1 }}\n{% for %}")


# --- errors of libraries ----------------------------------------------------------------------------------------------


def hub_error(cls):
    """An OSError as transformers raises it, caused by an error of the Hub client."""
    error = OSError("cannot be loaded")
    error.__cause__ = cls("no", **({"response": MagicMock(headers={})} if issubclass(cls, hub.HfHubHTTPError) else {}))
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (hub_error(hub.GatedRepoError), ModelError, ["is gated", "accept its terms", "hf auth login"]),
        (hub_error(hub.RepositoryNotFoundError), ModelError, ["has no model", "hf auth login"]),
        (hub_error(hub.RevisionNotFoundError), UsageError, ["no such revision"]),
        (hub_error(hub.LocalEntryNotFoundError), ModelError, ["not on this disk"]),
        (hub_error(hub.RemoteEntryNotFoundError), ModelError, ["lacks a file"]),
        (OSError(28, "No space left on device"), RunError, ["disk is full", "HF_HOME"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RunError, ["no memory left", "--dtype bf16"]),
        (ImportError("sentencepiece, please", name="sentencepiece"), ModelError, ["pip install sentencepiece"]),
    ],
)
def test_errors_of_libraries(monkeypatch, error, kind, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(base_config.PreTrainedConfig, "get_config_dict", fail)
    assert_refused("org/base", kind, "'org/base'", *words)


def test_hub_offline():
    for function in (load, load_tokenizer, load_convertible_base_config):
        with pytest.raises(ModelError, match=r"(?s)HF_HUB_OFFLINE.*local"):
            function("org/no-such-base")


def test_revision_of_a_folder(tiny_folder):
    assert_refused(tiny_folder, UsageError, "a revision ('v2')", "only with a Hub id", revision="v2")
