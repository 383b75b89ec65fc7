"""An adapter's files: what does not fit is refused by name, and a refused load leaves the model as it was."""

import errno
import json
import os
from pathlib import Path

import peft
import pytest
import torch
from adapter_checks import unchanged
from error_facts import has_code
from models_zoo import llama, run, shake
from safetensors.torch import load_file, save_file
from several_adapters import save_adapter

from slimtune import LoraConfig, PeftConfig, PeftModel, get_peft_model
from slimtune import get_peft_model_state_dict as get_state
from slimtune import set_peft_model_state_dict as set_state
from slimtune.errors import AdapterError, SlimtuneError, UnknownOrMissingFieldError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETTINGS = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
PREFIX = "base_model.model."


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter", SETTINGS)[0]


def edit_tensors(**change):
    """Change tensors of the file, by their keys without the prefix; None removes one."""

    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors |= {PREFIX + k: t for k, t in change.items()}
        tensors = {k: t for k, t in tensors.items() if t is not None}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def convert_tensors(convert):
    """Change every tensor of the file."""

    def edit(folder):
        save_file({k: convert(t) for k, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return edit


def edit_config(**values):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def key(layer=0):
    return f"model.layers.{layer}.self_attn.q_proj.lora_A.weight"


FAULTS = {
    "missing": (edit_tensors(**{key(): None}), AdapterError, ["1 of 9 tensors are missing", key()]),
    "missing head": (edit_tensors(**{"lm_head.weight": None}), AdapterError, ["1 of 9 tensors are missing"]),
    "unexpected": (edit_tensors(**{key(7): torch.zeros(8, 32)}), AdapterError,
                   ["1 tensors are unexpected", key(7), "did you mean"]),
    "other base weight": (edit_tensors(**{"model.embed_tokens.weight": torch.zeros(128, 32)}), AdapterError,
                          ["1 tensors are unexpected", "embed_tokens"]),
    "wrong shape": (edit_tensors(**{key(): torch.zeros(8, 16)}), AdapterError, ["(8, 16) in the file, (8, 32) here"]),
    "int8": (convert_tensors(lambda t: t.to(torch.int8)), AdapterError, ["another kind of numbers", "int8"]),
    "bool": (convert_tensors(torch.Tensor.bool), AdapterError, ["another kind of numbers", "bool"]),
    "complex": (convert_tensors(lambda t: t.to(torch.complex64)), AdapterError, ["numbers", "complex64"]),
    "infinite": (convert_tensors(lambda t: t / 0), AdapterError, ["contain NaN or Inf"]),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), AdapterError,
               ["adapter_model.bin is a pickle", WEIGHTS]),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 2000), AdapterError, ["is not a valid safetensors file"]),
    "empty": (write(WEIGHTS, ""), AdapterError, ["(0 bytes) is not a valid safetensors file"]),
    "not JSON": (write(CONFIG, '{"peft_type": '), AdapterError, ["is not JSON"]),
    "a list": (write(CONFIG, "[1]"), AdapterError, [CONFIG, "a JSON object"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), UsageError, [f"has no {WEIGHTS}; it has", "'README.md'"]),
    "no config": (lambda f: (f / CONFIG).unlink(), UsageError, [f"has no {CONFIG}; it has"]),
    "no method": (edit_config(peft_type=None), UnknownOrMissingFieldError, ["missing required keys: {'peft_type'}"]),
    "unknown method": (edit_config(peft_type="LORAX"), AdapterError, ["there is no method", "did you mean 'lora'"]),
    "unsupported field": (edit_config(use_qalora=True), AdapterError, ["no field 'use_qalora' (given True)"]),
    "newer field": (edit_config(lora_magic={"a": 1}), AdapterError,
                    ["LoraConfig has no field 'lora_magic' (given {'a': 1})", CONFIG]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["from_pretrained", "load_adapter"])
def test_invalid_adapter_raises_and_leaves_model_unchanged(folder, fault, method):
    spoil, error, message = FAULTS[fault]
    spoil(folder)
    model = llama()
    if method == "load_adapter":
        get_peft_model(model, LoraConfig(r=2, inference_mode=True))
    with unchanged(model), pytest.raises(error) as caught:
        getattr(PeftModel, method)(model, folder, "other")
    assert all(part in str(caught.value) for part in message), str(caught.value)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("adaptor", {}, "did you mean 'adapter'"),
        ("adapter", {"subfoldr": "x"}, "unknown argument 'subfoldr'; did you mean 'subfolder'"),
    ],
)
def test_wrong_arguments_of_from_pretrained(folder, path, arguments, message):
    model = llama()
    with pytest.raises(UsageError, match=message):
        PeftModel.from_pretrained(model, folder.parent / path, **arguments)
    assert not isinstance(model, PeftModel)


@pytest.mark.parametrize("setting", [{"lora_alpha": 99}, {"use_rslora": True}])
def test_loading_into_an_adapter_needs_same_settings(folder, setting):
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    edit_config(**setting)(folder)
    with unchanged(model), pytest.raises(AdapterError, match=rf"\b{next(iter(setting))}\b"):
        model.load_adapter(folder, "default")


def test_adapter_file_that_may_not_be_read_says_so(folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("folder", ["", None])
def test_no_folder_to_save_to_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"save_directory is {folder!r}"):
        get_peft_model(llama(), LoraConfig(r=2)).save_pretrained(folder)
    with pytest.raises(UsageError, match=f"save_directory is {folder!r}"):
        LoraConfig().save_pretrained(folder)
    assert not list(tmp_path.iterdir())


def test_save_writes_safetensors_only(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    with pytest.raises(UsageError, match="requests a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path / "new" / "deep")) == ["README.md", CONFIG, WEIGHTS]


def test_equal_adapters_have_equal_bytes(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    assert len({(tmp_path / WEIGHTS).read_bytes() for _ in range(12) if not model.save_pretrained(tmp_path)}) == 1


def test_named_adapters_are_saved_in_subfolders(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    model.add_adapter("poet", LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'poets'.*'poet'"):
        model.save_pretrained(tmp_path, selected_adapters=["poets"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "poet", "poet")
    loaded.load_adapter(tmp_path, "default")
    assert loaded.active_adapters == ["poet"]
    assert loaded.peft_config["poet"].r == 2
    assert PeftModel.from_pretrained(loaded, tmp_path, "third") is loaded
    assert list(loaded.peft_config) == ["poet", "default", "third"]


def test_is_trainable_continues_training(folder):
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert all(p.requires_grad == (".default." in n) for n, p in model.named_parameters())
    frozen = PeftModel.from_pretrained(llama(), folder)
    assert not frozen.training
    assert torch.equal(run(frozen), run(model.eval()))
    frozen.load_adapter(folder, "other", is_trainable=True)
    assert all(p.requires_grad == (".other." in n) for n, p in frozen.named_parameters())


def test_state_dict_equals_peft(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    ours, expected = get_state(model), peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(llama(), folder))
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[k], expected[k]) for k in ours)
    fresh = get_peft_model(llama(), PeftConfig.from_pretrained(folder))
    assert set_state(fresh, expected) == ([], [])
    assert torch.equal(run(fresh.eval()), run(model))
    with pytest.raises(AdapterError, match="state"):
        set_state(fresh, {k: t for k, t in expected.items() if "lora_A" in k})
    with pytest.raises(SlimtuneError, match="'x'"):
        get_state(fresh, adapter_name="x")


@pytest.mark.parametrize("value", [None, False, 0.0, "", [], {}], ids=repr)
def test_empty_unknown_field_is_ignored(folder, value):
    edit_config(lora_magic=value, peft_version="9.9.9", runtime_config={"ephemeral_gpu_offload": True})(folder)
    assert not hasattr(PeftModel.from_pretrained(llama(), folder).peft_config["default"], "lora_magic")


def test_peft_config_file_is_read(tmp_path):
    settings = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft.LoraConfig(**settings).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(**settings, peft_version=peft.__version__)


def test_another_base_is_rejected_by_its_fingerprint(folder):
    message = r"was trained on another base: its config has fingerprint [0-9a-f]{16}, this one has [0-9a-f]{16}"
    for other in (llama(tie=True), llama(intermediate_size=64), llama(hidden_act="gelu")):
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(other, folder)
    edit_tensors()(folder)  # PEFT's files have no fingerprint: names and shapes decide
    assert PeftModel.from_pretrained(llama(hidden_act="gelu"), folder)


def test_a_run_folder_loads_its_adapter(tmp_path):
    _, logits = save_adapter(tmp_path / "run" / "adapter", {})
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "run")
    assert torch.equal(run(loaded), logits)
    save_adapter(tmp_path / "run", {"r": 2})
    assert PeftModel.from_pretrained(llama(), tmp_path / "run").peft_config["default"].r == 2
    (tmp_path / "empty" / "adapter").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"empty .*{WEIGHTS}.*'adapter'"):
        PeftModel.from_pretrained(llama(), tmp_path / "empty")


def test_other_adapters_while_one_is_merged(tmp_path):
    model = shake(get_peft_model(llama(), LoraConfig()))
    model.save_pretrained(tmp_path)
    expected = run(model.eval())
    model.merge_adapter()
    merged = run(model)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    model.load_adapter(tmp_path, "loaded")
    model.rename_adapter("default", "renamed")
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        model.load_adapter(tmp_path, "renamed")
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        model.delete_adapter("renamed")
    assert torch.equal(run(model), merged)
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    model.set_adapter("loaded")
    assert torch.equal(run(model), expected)
    model.delete_adapter("renamed")
    assert list(model.peft_config) == ["other", "loaded"]
    assert torch.equal(run(model.unload()), run(llama()))
