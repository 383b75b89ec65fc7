"""`slimtune methods`: read from config classes, sized on a base that is never loaded; and the index page of methods."""

import json
import re
from pathlib import Path

import peft
import pytest
from models_zoo import llama
from safetensors.torch import load_file
from transformers import MambaConfig

from slimtune import get_peft_model
from slimtune.core.adapters.method_registry import METHODS, MISSING, get_method_config_class, list_methods
from slimtune.core.config.method_settings import fill_recipe_defaults
from slimtune.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs/methods"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("tiny")
    llama().config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def described(slimtune_json) -> dict:
    return {m["name"]: m for m in slimtune_json("methods")["methods"]}


def test_every_method_is_described_as_its_class(described):
    assert list(described) == list(list_methods())
    for name, method in described.items():
        cls = get_method_config_class(name)
        assert method["summary"]
        assert method["sites"] == list(cls.kinds)
        formats = method["export_formats"]
        assert (formats["merged_model"], formats["ollama_merged"]) == (cls.mergeable, cls.mergeable)
        assert (formats["ollama_adapter"], formats["vllm_adapter"]) == (cls.uses_lora_file_format,) * 2
    assert [(m["name"], f["name"]) for m in described.values() for f in m["fields"] if not f["help"]] == []


def test_table(slimtune):
    lines = slimtune("methods", columns=200).stdout.splitlines()
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in lines if line and line[0] != " "}
    assert len(rows["method"]) == 4
    assert set(rows) > set(list_methods())
    assert rows["lora"][2] == "file, merged, lora"
    assert rows["bottleneck"][2] == "file"
    assert max(map(len, slimtune("methods").stdout.splitlines())) <= 80


def test_every_figure_has_a_source(slimtune, described, base):
    assert [name for name, m in described.items() if not m["papers"]] == []
    text = " ".join(slimtune("methods", "ia3", "--model", base, "--sources").stdout.split())
    assert "ia3 https://arxiv.org/abs/2205.05638" in text
    assert f"config {base}" in text.replace("/ ", "/")


def test_fields_of_one_method(slimtune, described):
    fields = {f["name"]: f for f in described["lora"]["fields"]}
    assert fields["r"] == {
        "name": "r", "expected": "an integer, at least 1", "default": "8", "recipe_default": "16",
        "short_name": "rank", "flag": "--rank", "help": "rank of the update; typically 4 to 64",
    }  # fmt: skip
    assert fields["lora_alpha"]["recipe_default"] == "32"
    assert "inference_mode" not in fields
    text = slimtune("methods", "LORA").stdout
    assert f"\nr (rank, --rank)   {fields['r']['expected']}; default 8; recipes: 16\n" in text
    assert "bottleneck" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["botleneck"], "there is no method 'botleneck'; did you mean 'bottleneck'?"),
        (["lora", "--model", "smollm2-135"], "did you mean 'smollm2-135m'?"),
    ],
)
def test_unknown_names(slimtune, args, message):
    done = slimtune("methods", *args, "--json")
    assert done.exit_code == 2
    assert message in json.loads(done.stdout)["error"]["message"]


def test_sizes_are_those_of_real_adapters(slimtune, slimtune_json, base, tmp_path):
    sizes = {m["name"]: m for m in slimtune_json("methods", "--model", base)["methods"]}
    assert set(sizes) == set(list_methods())
    for name in ("lora", "bottleneck", "prompt_tuning"):
        cls = get_method_config_class(name)
        settings = fill_recipe_defaults({}, cls)
        settings |= {"neutral_start": False} if name == "prompt_tuning" else {}
        real = get_peft_model(llama(), cls(task_type="CAUSAL_LM", **settings))
        trained, total = real.get_nb_trainable_parameters()
        real.float().save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors").values()
        assert sizes[name]["trainable_params"] == trained
        assert sizes[name]["trainable_percent"] == pytest.approx(100 * trained / total)
        assert sizes[name]["adapter_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert 99 < sizes["full"]["trainable_percent"] <= 100
    lines = slimtune("methods", "lora", "--model", base).stdout.splitlines()
    assert lines[0].split()[:4] == ["method", "trains", "%", "adapter"]
    assert lines[1].split()[:3] == ["lora", "14.8", "k"]


def test_method_that_does_not_fit_the_base(slimtune, slimtune_json, tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, architectures=["MambaForCausalLM"])
    config.save_pretrained(tmp_path)
    (method,) = slimtune_json("methods", "bottleneck", "--model", tmp_path)["methods"]
    assert "MambaForCausalLM" in method["unfit"]
    assert "trainable_params" not in method
    text = " ".join(slimtune("methods", "bottleneck", "--model", tmp_path).stdout.split())
    assert method["unfit"].split(" of a ")[0] in text


def test_index_page_has_a_line_for_each_method(described):
    lines = [line for line in (DOCS / "README.md").read_text().splitlines() if line.startswith("- [")]
    built_in = METHODS.built_in_names()
    assert lines == [f"- [{name}]({name}.md): {described[name]['summary']}" for name in built_in]
    assert [name for name in built_in if not (DOCS / f"{name}.md").is_file()] == [], "pages that are missing"


def test_a_method_that_peft_alone_has_is_named_as_such():
    missing = {name for names in MISSING.values() for name in names}
    assert missing == {kind.value.lower() for kind in peft.PeftType} - set(list_methods())
    assert MISSING.keys() - {""} <= set(list_methods())
    with pytest.raises(ConfigError) as error:
        get_method_config_class("FourierFT")
    assert error.value.code == "peft-name-missing"
