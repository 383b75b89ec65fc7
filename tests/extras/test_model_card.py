"""Model cards: what they say of a method, that names cannot break them, and that a user's text is kept."""

import re

import models_zoo
import peft
import pytest
import yaml

import slimtune
from slimtune.core.adapters.method_registry import METHODS, get_method_config_class
from slimtune.evaluation.run_results import RunResults
from slimtune.export.base_model_info import BaseModelInfo, Licence
from slimtune.export.push_to_hub import render_adapter_card
from slimtune.extras.model_card import strip_local_paths, write_model_card


def make_card(method, base=None, **settings):
    facts = {"repo_id": "ada/words", "file_bytes": 9, "parameters": 9, "tokenizer_id": "ada/tiny", "chat": False}
    base = base or BaseModelInfo("ada/tiny", "ada/tiny")
    return render_adapter_card(get_method_config_class(method)(**settings), base, RunResults(), **facts)


def get_metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


@pytest.fixture
def config():
    return get_method_config_class("lora")(base_model_name_or_path="ada/tiny", task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", sorted(METHODS.built_in_names()))
def test_which_methods_peft_has(name):
    assert (name.upper() in peft.PeftType.__members__) == get_method_config_class(name).exists_in_peft


def test_adapter_that_vllm_serves():
    assert "vllm serve ada/tiny --enable-lora --max-lora-rank 8" in make_card("lora")
    assert "--max-lora-rank 64" in make_card("lora", r=33)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"r": 600}], ids=str
)
def test_adapter_that_must_be_merged_for_vllm(settings):
    card = make_card("lora", **settings)
    assert "vllm serve" not in card
    assert "merge_and_unload" in card


def test_method_that_only_slimtune_has():
    card = make_card("bottleneck")
    assert "peft has no method" in card
    assert "does not change weights" in card
    assert 'AutoTokenizer.from_pretrained("ada/tiny")' in card


def test_names_cannot_break_the_card():
    licence = Licence("a | b\n<script>", "x", {"license": "a: b\n---\n"})
    card = make_card("lora", BaseModelInfo("x`|y\n# z", None, None, licence, "q`.gguf"))
    assert get_metadata(card)["license"] == "a: b\n---\n"
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "<script>" not in card
    assert "\n# z" not in card


def test_saved_adapter_has_a_short_card(config, tmp_path):
    file = tmp_path / "README.md"
    write_model_card(config, tmp_path)
    metadata = get_metadata(file.read_text())
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "ada/tiny")
    assert {"lora", "transformers", "base_model:adapter:ada/tiny"} <= set(metadata["tags"])
    config.r, config.base_model_name_or_path = 3, str(tmp_path)
    write_model_card(config, tmp_path)  # replaces a card that slimtune wrote
    card = file.read_text()
    assert '"r": 3' in card
    assert tmp_path.name in card
    assert str(tmp_path) not in card
    assert "base_model" not in get_metadata(card)


def test_text_of_a_users_card_is_kept(config, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("---\nmeta: hello\ntags:\n- mine\nbase_model: my/base\n---\n# By hand\n")
    write_model_card(config, tmp_path)
    metadata = get_metadata(file.read_text())
    assert file.read_text().endswith("\n# By hand\n")
    assert (metadata["meta"], metadata["library_name"], metadata["base_model"]) == ("hello", "peft", "my/base")
    assert {"mine", "lora"} <= set(metadata["tags"])
    file.write_text("---\nmeta: [\n---\n# By hand\n")
    write_model_card(config, tmp_path)
    assert file.read_text() == "---\nmeta: [\n---\n# By hand\n", "invalid metadata is left to its author"


def test_local_paths_are_stripped(tmp_path):
    values = {
        "base_model_name_or_path": str(tmp_path / "gone"), "tokenizer_name_or_path": str(tmp_path), "r": 4,
        "nested": {"path": [str(tmp_path), "org/name"]}, "target_modules": ".*q_proj",
    }  # fmt: skip
    assert strip_local_paths(values) == {
        "base_model_name_or_path": "gone", "tokenizer_name_or_path": "gone", "r": 4,
        "nested": {"path": [tmp_path.name, "org/name"]}, "target_modules": ".*q_proj",
    }  # fmt: skip
    assert strip_local_paths(values, "org/base")["tokenizer_name_or_path"] == "org/base"


def test_card_has_the_tags_of_the_base(tmp_path):
    base = models_zoo.llama()
    base.add_model_tags(["mine"])
    slimtune.get_peft_model(base, slimtune.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "- mine\n" in (tmp_path / "README.md").read_text()
