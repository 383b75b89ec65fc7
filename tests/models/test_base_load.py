import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from transformers.utils import logging as theirs

from slimtune.errors import ModelError, RunError, SlimtuneError, UsageError
from slimtune.models import registry
from slimtune.models.errors import translate_load_errors
from slimtune.models.loader import load_base, load_tokenizer
from slimtune.models.registry import load_config


def load(spec: Path | str, **options: Any) -> Any:
    return load_base(str(spec), **{"dtype": "fp32", "device": "cpu", **options})


def refused(spec: Path | str, kind: type[SlimtuneError], code: int, *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        load(spec, **options)
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    for word in words:
        assert word in str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    facts = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def test_a_folder_is_loaded(tiny_folder: Path, tiny_llama: Callable[..., Any], capsys: Any) -> None:
    base = load(tiny_folder)
    assert capsys.readouterr() == ("", "")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, tiny_llama()(ids).logits)
    assert not base.model.training
    assert base.model.config._attn_implementation == "sdpa"
    assert (base.dtype, base.device, base.source.kind) == (torch.float32, torch.device("cpu"), "folder")
    assert base.prepare_seconds == 0 < base.load_seconds
    assert len(base.fingerprint) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_attention_are_followed(tiny_folder: Path, dtype: torch.dtype) -> None:
    base = load(tiny_folder, dtype=dtype, attn_implementation="eager")
    assert {p.dtype for p in base.model.parameters()} == {dtype}
    assert base.model.config._attn_implementation == "eager"
    assert base.fingerprint == load(tiny_folder).fingerprint


def test_config_and_tokenizer_need_no_weights(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    assert load_config(str(tiny_folder)).hidden_size == 32
    assert load_tokenizer(str(tiny_folder)).eos_token == "<|im_end|>"
    refused(tiny_folder, ModelError, 1, "cannot be loaded", "model.safetensors")


def test_settings_around_the_load_are_put_back(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with translate_load_errors("x"):
        print("a remark")
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
        assert not theirs.is_progress_bar_enabled()
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_remarks_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with translate_load_errors("x"):
        print("a remark")
    assert capsys.readouterr() == ("", "a remark\n")


# --- remote code ---


@pytest.fixture
def foreign_folder(tiny_folder: Path) -> Path:
    (tiny_folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(tiny_folder / "config.json", model_type="own", auto_map=maps, architectures=["OwnModel"])
    return tiny_folder


def test_remote_code_is_refused_unless_trusted(
    foreign_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody may be asked on the terminal"))
    refused(foreign_folder, UsageError, 2, "brings code of its own", "--trust-remote-code")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load_tokenizer(str(foreign_folder))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load_config(str(foreign_folder))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = load(foreign_folder, trust_remote_code=True)
    assert type(base.model).__name__ == "OwnModel"


def test_a_known_config_whose_model_is_remote_is_caught_too(tiny_folder: Path) -> None:
    edit(tiny_folder / "config.json", auto_map={"AutoModelForTokenClassification": "own.Own"}, model_type="mamba")
    refused(tiny_folder, UsageError, 2, "--trust-remote-code", task="TOKEN_CLS")


def test_a_map_that_is_not_needed_does_no_harm(tiny_folder: Path) -> None:
    edit(tiny_folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert type(load(tiny_folder).model).__module__.startswith("transformers.")


# --- faulty folders ---


def test_an_architecture_nobody_knows(tiny_folder: Path) -> None:
    edit(tiny_folder / "config.json", model_type="of_tomorrow")
    refused(tiny_folder, ModelError, 1, "of_tomorrow", "pip install -U transformers")


def test_broken_config(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("{half")
    refused(tiny_folder, ModelError, 1, "cannot be loaded", "config.json")


def test_cut_weights(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused(tiny_folder, ModelError, 1, "cannot be loaded", "SafetensorError", "undamaged")


def test_a_missing_weight_is_never_filled_at_random(tiny_folder: Path) -> None:
    edit(tiny_folder / "config.json", num_hidden_layers=3)
    refused(tiny_folder, ModelError, 1, "lacks 9 weights", "layers.2", "filled at random")


def test_wrong_shapes(tiny_folder: Path) -> None:
    edit(tiny_folder / "config.json", intermediate_size=96)
    refused(tiny_folder, ModelError, 1, "cannot be loaded")


def test_unused_weights_are_said_aloud(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(tiny_folder / "config.json", num_hidden_layers=1)
    load(tiny_folder)
    assert "unused weights of the checkpoint: 'model.layers.1" in caplog.text


def test_a_folder_without_tokenizer(tiny_folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_folder / file).unlink()
    refused(tiny_folder, ModelError, 1, "tokenizer")


def test_a_tokenizer_that_is_too_large(tiny_folder: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(80)])
    tokenizer.save_pretrained(tiny_folder)
    refused(tiny_folder, ModelError, 1, "ids up to 338", "the model has 320 embeddings")


def test_no_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    refused(tiny_folder, RunError, 1, "no memory left", "--dtype bf16")


# --- tasks, pad token, template ---


def test_other_tasks(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = load(tiny_folder, task="SEQ_CLS")
    assert type(base.model).__name__ == "LlamaForSequenceClassification"
    assert base.model.config.pad_token_id == 0
    assert "new weights, to be trained: 'score.weight'" in caplog.text
    assert type(load(tiny_folder, task="TOKEN_CLS").model).__name__ == "LlamaForTokenClassification"
    assert type(load(tiny_folder, task="FEATURE_EXTRACTION").model).__name__ == "LlamaModel"
    refused(tiny_folder, ModelError, 1, "no model for this task", task="SEQ_2_SEQ_LM")
    refused(tiny_folder, UsageError, 2, "did you mean 'SEQ_CLS'?", task="SEQ_CLZ")


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"], "<|finetune_right_pad_id|>"),
        (["<pad>"], "<pad>"),
        (["<|PAD_TOKEN|>"], "<|PAD_TOKEN|>"),
        (["[PAD]"], "[PAD]"),
        (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<|image_pad|>", "<|fim_pad|>"], "<|im_end|>"),
        (["<iPad>"], "<|im_end|>"),
        ([], "<|im_end|>"),
    ],
)
def test_a_missing_pad_token_is_chosen(
    tiny_folder: Path, tiny_tokenizer: Callable[..., Any], extra: list[str], wanted: str
) -> None:
    tokenizer = tiny_tokenizer(pad_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.save_pretrained(tiny_folder)
    base = load(tiny_folder)
    assert base.tokenizer.pad_token == wanted
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id


def test_neither_pad_nor_end(tiny_folder: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    tiny_tokenizer(pad_token=None, eos_token=None).save_pretrained(tiny_folder)
    refused(tiny_folder, ModelError, 1, "neither a pad token nor an end-of-text token")


def test_a_given_template_replaces_the_own(tiny_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    for given in (text, file, str(file)):
        tokenizer = load_tokenizer(str(tiny_folder), chat_template=given)
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "[user] hi"
    # One that wants more than a user turn is taken; the data room says what is missing, with the row at hand.
    strict = "{{ raise_exception('a system turn, please') }}"
    assert load(tiny_folder, chat_template=strict).tokenizer.chat_template == strict


def test_templates_that_cannot_be(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(" \n")
    missing = tmp_path / "chatlm.jinja"
    refused(tiny_folder, UsageError, 2, "no chat template file", "'chatml.jinja'?", chat_template=missing)
    refused(tiny_folder, UsageError, 2, "is empty", chat_template=tmp_path / "chatml.jinja")
    refused(tiny_folder, UsageError, 2, "cannot be read", chat_template=tmp_path)
    refused(tiny_folder, UsageError, 2, "not valid Jinja", "line 2", chat_template="{{ 1 }}\n{% for %}")


# --- the Hub ---


def test_the_hub_out_of_reach() -> None:
    words = ("'org/no-such-base'", "not on this disk", "HF_HUB_OFFLINE", "local folder")
    refused("org/no-such-base", ModelError, 1, *words)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_tokenizer("org/no-such-base")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (hub.GatedRepoError, ModelError, ["is gated", "accept its terms", "hf auth login"]),
        (hub.RepositoryNotFoundError, ModelError, ["has no model", "private", "hf auth login"]),
        (hub.RevisionNotFoundError, UsageError, ["no such revision"]),
        (hub.LocalEntryNotFoundError, ModelError, ["not on this disk", "network"]),
        (hub.RemoteEntryNotFoundError, ModelError, ["lacks a file"]),
    ],
)
def test_what_the_hub_answers(
    monkeypatch: pytest.MonkeyPatch, error: Any, kind: type[SlimtuneError], words: list[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        answer = {"response": MagicMock(headers={})} if issubclass(error, hub.HfHubHTTPError) else {}
        raise OSError("cannot be had") from error("said no", **answer)

    monkeypatch.setattr(registry.PreTrainedConfig, "get_config_dict", fail)
    refused("org/base", kind, kind.exit_code, "'org/base'", *words)


def test_a_revision_belongs_to_the_hub(tiny_folder: Path) -> None:
    refused(tiny_folder, UsageError, 2, "a revision ('v2')", "only with a Hub id", revision="v2")


def test_a_full_disk_while_downloading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry.PreTrainedConfig, "get_config_dict", fail)
    refused("org/base", RunError, 1, "disk is full", "HF_HOME")


def test_a_shard_that_is_missing(tiny_folder: Path, tiny_llama: Callable[..., Any]) -> None:
    (tiny_folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(tiny_folder, max_shard_size="30KB")
    assert load(tiny_folder).model is not None
    shard = sorted(tiny_folder.glob("model-*.safetensors"))[1]
    shutil.move(shard, tiny_folder.parent)
    refused(tiny_folder, ModelError, 1, "cannot be loaded", shard.name)
