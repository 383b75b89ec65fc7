"""An adapter's files: what does not fit is refused by name, and a refused load leaves the model as it was."""

import json
import os

import peft
import pytest
import torch
from models_zoo import llama, run, same_base, shake, snapshot
from safetensors.torch import load_file, save_file

from slimtune import LoraConfig, PeftConfig, PeftModel, get_peft_model
from slimtune import get_peft_model_state_dict as get_state
from slimtune import set_peft_model_state_dict as set_state
from slimtune.errors import AdapterError, SlimtuneError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def key(layer=0):
    return f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"


def missing(folder):
    edit_tensors(folder, lambda t: t.pop(key()))


def missing_head(folder):
    edit_tensors(folder, lambda t: t.pop("base_model.model.lm_head.weight"))


def unexpected(folder):
    edit_tensors(folder, lambda t: t.update({key(7): torch.zeros(8, 32)}))


def other_base_weight(folder):
    edit_tensors(folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(128, 32)}))


def wrong_shape(folder):
    edit_tensors(folder, lambda t: t.update({key(): torch.zeros(8, 16)}))


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncated(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def not_json(folder):
    (folder / CONFIG).write_text('{"peft_type": ')


def a_list(folder):
    (folder / CONFIG).write_text("[1]")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def no_config(folder):
    (folder / CONFIG).unlink()


def no_method(folder):
    edit_config(folder, peft_type=None)


def unknown_method(folder):
    edit_config(folder, peft_type="LORAX")


def qalora(folder):
    edit_config(folder, use_qalora=True)


def newer_field(folder):
    edit_config(folder, lora_magic=3)


FAULTS = [
    (missing, AdapterError, ["1 of 9 tensors are missing", key()]),
    (missing_head, AdapterError, ["1 of 9 tensors are missing", "lm_head.weight"]),
    (unexpected, AdapterError, ["1 tensors are unexpected", key(7), "did you mean"]),
    (other_base_weight, AdapterError, ["1 tensors are unexpected", "embed_tokens"]),
    (wrong_shape, AdapterError, ["another shape", "(8, 16) in the file, (8, 32) here"]),
    (pickled, AdapterError, ["adapter_model.bin is a pickle", WEIGHTS, "save the adapter again"]),
    (truncated, AdapterError, ["is not a valid safetensors file", "bytes)"]),
    (empty, AdapterError, ["(0 bytes) is not a valid safetensors file"]),
    (not_json, AdapterError, ["is not JSON"]),
    (a_list, AdapterError, ["adapter_config.json", "a JSON object"]),
    (no_weights, UsageError, [f"has no {WEIGHTS}; it has", "'README.md'"]),
    (no_config, UsageError, [f"has no {CONFIG}; it has"]),
    (no_method, AdapterError, ["has no peft_type"]),
    (unknown_method, AdapterError, ["there is no method", "did you mean 'lora'"]),
    (qalora, AdapterError, ["LoraConfig has no field 'use_qalora' (given True)"]),
    (newer_field, AdapterError, ["LoraConfig has no field 'lora_magic' (given 3)"]),
]


@pytest.mark.parametrize(("spoil", "error", "said"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_invalid_adapter_raises_and_leaves_model_unchanged(folder, spoil, error, said, door):
    spoil(folder)
    model = llama()
    if door == "load_adapter":
        get_peft_model(model, LoraConfig(r=2, inference_mode=True))
    before, kinds = snapshot(model), {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    load = PeftModel.load_adapter if door == "load_adapter" else PeftModel.from_pretrained
    with pytest.raises(error) as fault:
        load(model, folder, "other")
    assert all(part in str(fault.value) for part in said), str(fault.value)
    assert fault.value.exit_code == (1 if error is AdapterError else 2)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert same_base(model, before)


def test_missing_folder_names_the_nearest(folder):
    with pytest.raises(UsageError, match="did you mean 'adapter'") as fault:
        PeftModel.from_pretrained(llama(), folder.parent / "adaptor")
    assert fault.value.exit_code == 2
    with pytest.raises(UsageError, match="there is no folder 'no-such-adapter'"):
        PeftModel.from_pretrained(llama(), "no-such-adapter")


def test_unknown_argument_is_rejected(folder):
    model = llama()
    with pytest.raises(UsageError, match="unknown argument 'subfoldr'; did you mean 'subfolder'") as fault:
        PeftModel.from_pretrained(model, folder, subfoldr="x")
    assert fault.value.exit_code == 2
    assert not isinstance(model, PeftModel)


@pytest.mark.parametrize("setting", [{"lora_alpha": 99}, {"use_rslora": True}])
def test_loading_into_an_adapter_needs_same_settings(folder, setting):
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    before = snapshot(model)
    edit_config(folder, **setting)
    (name,) = setting
    with pytest.raises(AdapterError, match=f"trained with other settings: {name} is") as fault:
        model.load_adapter(folder, "default")
    assert fault.value.exit_code == 1
    assert same_base(model, before)


def test_save_writes_safetensors_only(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    with pytest.raises(UsageError, match="requests a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path / "new" / "deep")) == ["README.md", CONFIG, WEIGHTS]


def test_named_adapters_are_saved_in_subfolders(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    model.add_adapter("poet", LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    assert (tmp_path / "poet" / WEIGHTS).is_file()
    with pytest.raises(UsageError, match="did you mean 'poet'"):
        model.save_pretrained(tmp_path, selected_adapters=["poets"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "poet", "poet")
    again.load_adapter(tmp_path, "default")
    assert again.active_adapters == ["poet"]
    assert again.peft_config["poet"].r == 2
    assert PeftModel.from_pretrained(again, tmp_path, "third") is again
    assert list(again.peft_config) == ["poet", "default", "third"]
    for wrong in ("poet", "a.b", ""):
        with pytest.raises(UsageError, match="cannot be the name of a new adapter"):
            again.add_adapter(wrong, LoraConfig())


def test_get_peft_model_twice_raises(folder):
    model = get_peft_model(llama(), LoraConfig())
    with pytest.raises(UsageError, match="already has adapters: 'default'"):
        get_peft_model(model, LoraConfig())
    with pytest.raises(UsageError, match="is not the config of a method"):
        get_peft_model(llama(), PeftConfig())


def test_is_trainable_continues_training(folder):
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".default." in n
    }
    frozen = PeftModel.from_pretrained(llama(), folder)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(run(frozen), run(model.eval()))
    frozen.load_adapter(folder, "other", is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_state_dict_equals_peft(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    theirs = peft.PeftModel.from_pretrained(llama(), folder)
    ours, expected = get_state(model), peft.get_peft_model_state_dict(theirs)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[k], expected[k]) for k in ours)
    fresh = get_peft_model(llama(), PeftConfig.from_pretrained(folder))
    assert set_state(fresh, expected) == ([], [])
    assert torch.equal(run(fresh.eval()), run(model))
    with pytest.raises(AdapterError, match="the state dict does not fit"):
        set_state(fresh, {k: t for k, t in expected.items() if "lora_A" in k})
    with pytest.raises(SlimtuneError, match="no adapter 'x'"):
        get_state(fresh, adapter_name="x")
