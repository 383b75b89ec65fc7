"""Adapters that are loaded in Python say if their base has changed; those made of others say what these had."""

import json
import shutil

import pytest
import torch
from error_facts import has_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import recipe_of, write_settings
from transformers import AutoModelForCausalLM

import slimtune
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError, PeftWarning
from slimtune.extras.base_digests import require_cached_snapshot

HI = torch.arange(3, 40)[None]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A folder with base/, and runs "whole" and "ia3" on it; "other" is on base2/."""
    home = tmp_path_factory.mktemp("trained")
    settings = write_settings(home, tiny_llama, tiny_tokenizer)
    settings["train"] |= {"epochs": 1, "max_steps": 1}
    train(recipe_of(settings))
    ia3 = {"method": {"name": "ia3"}, "output_dir": str(home / "ia3")}
    train(recipe_of({**settings, **ia3}))
    shutil.copytree(home / "base", home / "base2")
    change_weights(home / "base2")
    other = {"model": {**settings["model"], "name": str(home / "base2")}, "output_dir": str(home / "other")}
    train(recipe_of({**settings, **other}))
    return home


@pytest.fixture
def home(trained, tmp_path):
    home = shutil.copytree(trained, tmp_path / "home")
    for file in home.glob("*/adapter/adapter_config.json"):
        file.write_text(file.read_text().replace(str(trained), str(home)))
    return home


def change_weights(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][31, 17] += 0.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def change_config(base):
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 0.1}))


def load_base_model(home, name="base"):
    return AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32)


def load(home, run="whole", base="base"):
    return slimtune.PeftModel.from_pretrained(load_base_model(home, base), home / run / "adapter")


def read_record(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        text = (file.metadata() or {}).get("training_fingerprint")
    return None if text is None else json.loads(text)


def save(model, home, name):
    model.save_pretrained(home / "saved", selected_adapters=[name])
    return read_record(home / "saved" / ("" if name == "default" else name))


# --- PeftModel.from_pretrained ----------------------------------------------------------------------------------------


def test_unchanged_base_is_silent(home):
    load(home)


@pytest.mark.parametrize(
    ("change", "text"), [(change_weights, "'up_proj\\.weight'"), (change_config, "rms_norm_eps: 1e-06 then, 0.1 now")]
)
def test_changed_base_is_one_warning(home, change, text):
    change(home / "base")
    with pytest.warns(PeftWarning, match=text) as warned:
        load(home)
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_load_adapter_and_hotswap_compare_the_base_too(home):
    change_weights(home / "base")
    with pytest.warns(PeftWarning):
        model = load(home)
    with pytest.warns(PeftWarning, match="'up_proj"):
        model.load_adapter(home / "whole/adapter", "second")
    with pytest.warns(PeftWarning, match="'up_proj"):
        slimtune.hotswap_adapter(model, home / "whole/adapter", "second")


def test_accepted_change_is_silent(home):
    change_weights(home / "base")
    with slimtune.accept_changes(("weights",)):
        load(home)


def test_what_load_run_compared_is_not_compared_again(home):
    change_weights(home / "base")
    load_run(home / "whole/adapter", accept_changed=("weights",))


def test_adapter_of_another_base_of_the_same_shapes_is_told(home):
    with pytest.warns(PeftWarning, match="'up_proj\\.weight'"):
        load(home, "other")


def test_base_without_files_is_not_proven(home):
    model = load_base_model(home)
    model.config._name_or_path = model.name_or_path = ""
    with pytest.warns(PeftWarning, match="proven") as warned:
        slimtune.PeftModel.from_pretrained(model, home / "whole/adapter")
    assert len(warned) == 1


def test_files_without_a_record_or_with_a_damaged_one(home):
    file = home / "whole/adapter/adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    change_weights(home / "base")
    load(home)
    save_file(load_file(file), file, {"format": "pt", "training_fingerprint": '{"weights": 3}'})
    with pytest.warns(PeftWarning, match="proven"):
        load(home)


# --- a base of the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_base(home, monkeypatch):
    """The base as the Hub's cache has it; returns its snapshot."""
    commit, cache = "0" * 40, home / "hub" / "models--org--tiny"
    shutil.copytree(home / "base", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return cache / "snapshots" / commit


def test_base_in_the_cache_of_the_hub_is_compared(home, hub_base):
    def load_by_hub_id():
        model = load_base_model(home)
        model.name_or_path = "org/tiny"
        return slimtune.PeftModel.from_pretrained(model, home / "whole/adapter")

    load_by_hub_id()
    change_weights(hub_base)
    with pytest.warns(PeftWarning, match="org/tiny .*'up_proj\\.weight'"):
        load_by_hub_id()
    shutil.rmtree(hub_base)
    with pytest.warns(PeftWarning, match="org/tiny .* proven"):
        load_by_hub_id()


def test_one_of_several_cached_revisions_is_not_proven(home, hub_base):
    shutil.copytree(hub_base, hub_base.with_name("1" * 40))
    model = load_base_model(home)
    model.name_or_path = "org/tiny"
    with pytest.warns(PeftWarning, match="proven"):
        slimtune.PeftModel.from_pretrained(model, home / "whole/adapter")


def test_missing_snapshot_is_said_in_one_sentence(hub_base):
    assert require_cached_snapshot("org/tiny", None) == hub_base
    with pytest.raises(OSError, match=r"^[^.]+v2$"):
        require_cached_snapshot("org/tiny", "v2")


# --- adapters made of adapters ----------------------------------------------------------------------------------------

BASE_PARTS = {"version", "weights", "config", "tokenizer", "template"}


def test_saved_again_an_adapter_says_its_base_but_no_rows(home):
    before = read_record(home / "whole/adapter")
    record = save(load(home), home, "default")
    assert record == {part: before[part] for part in BASE_PARTS}


def test_converted_adapter_has_its_sources_base(home):
    before, model = read_record(home / "ia3/adapter"), load(home, "ia3")
    slimtune.save_as_lora(home / "lora", model, 4)
    assert read_record(home / "lora") == {part: before[part] for part in BASE_PARTS}
    model.to_lora("default", 2)
    assert save(model, home, "default_lora") == read_record(home / "lora")


def test_sum_of_adapters_has_what_they_share(home):
    model = load(home)
    model.load_adapter(home / "ia3/adapter", "scaled")
    model.add_weighted_adapter(["default", "scaled"], [0.5, 0.5], "both", svd_rank=4)
    model.add_weighted_adapter(["scaled", "scaled"], [0.5, 0.5], "twice")
    model.load_adapter(home / "whole/adapter", "second")
    model.add_weighted_adapter(["default", "second"], [1, 1], "cat", combination_type="cat")
    before = read_record(home / "whole/adapter")
    assert save(model, home, "both") == {part: before[part] for part in BASE_PARTS}
    assert save(model, home, "twice") == save(model, home, "cat") == save(model, home, "both")


def test_sum_with_an_adapter_that_says_nothing_has_the_others_base(home):
    model = load(home)
    model.add_adapter("new", slimtune.LoraConfig(r=4))
    model.add_weighted_adapter(["new", "default"], [1, 1], "sum", combination_type="linear")
    model.add_weighted_adapter(["new"], [1], "plain")
    assert set(save(model, home, "sum")) == BASE_PARTS
    assert save(model, home, "plain") is None


def test_adapters_of_two_bases_have_no_sum(home):
    model = load(home)
    with pytest.warns(PeftWarning):
        model.load_adapter(home / "other/adapter", "other")
    with pytest.raises(AdapterError, match=r"'default' .*'other' .*'up_proj", check=has_code("wrong-base")):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert "sum" not in model.peft_config
    with slimtune.accept_changes(("weights",)):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert set(save(model, home, "sum")) == BASE_PARTS - {"weights"}


def test_other_values_have_another_record(home):
    model = load(home)
    with pytest.warns(PeftWarning):
        slimtune.hotswap_adapter(model, home / "other/adapter", "default")
    assert save(model, home, "default")["weights"] == read_record(home / "other/adapter")["weights"]
    slimtune.set_peft_model_state_dict(model, slimtune.get_peft_model_state_dict(model))
    assert save(model, home, "default") is None


def test_converted_adapter_is_refused_on_a_changed_base(home):
    slimtune.save_as_lora(home / "lora", load(home, "ia3"), 4)
    change_weights(home / "base")
    with pytest.raises(AdapterError, match="'up_proj\\.weight'", check=has_code("wrong-base")):
        load_run(home / "lora")
