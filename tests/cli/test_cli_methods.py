"""`slimtune methods`: read from config classes, sized on a base that is never loaded; and the index page of methods."""

import json
import re
from pathlib import Path

import pytest
from models_zoo import llama
from safetensors.torch import load_file
from transformers import MambaConfig
from typer.testing import CliRunner

import slimtune.methods
from slimtune import get_peft_model
from slimtune.cli import app
from slimtune.config.method import fill_recipe_defaults

DOCS = Path(__file__).parents[2] / "docs/methods"


def methods(*args: str, columns: int = 200):
    return CliRunner().invoke(app, ["methods", *args], env={"COLUMNS": str(columns)})


def read_json(*args: str) -> dict:
    done = methods(*args, "--json")
    assert done.exit_code == 0, done.stderr
    return {m["name"]: m for m in json.loads(done.stdout)["methods"]}


@pytest.fixture
def base(tmp_path) -> str:
    """A folder with a config and no weights."""
    llama().config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture(scope="module")
def described() -> dict:
    return read_json()


def test_every_method_is_described_as_its_class(described):
    assert list(described) == list(slimtune.methods.method_names())
    for name, method in described.items():
        cls = slimtune.methods.config_class(name)
        assert method["summary"]
        assert method["sites"] == list(cls.kinds)
        formats = method["export_formats"]
        assert (formats["merged_model"], formats["ollama_merged"]) == (cls.mergeable, cls.mergeable)
        assert (formats["ollama_adapter"], formats["vllm_adapter"]) == (cls.ships_as_lora, cls.ships_as_lora)


def test_every_field_has_help(described):
    assert [(m["name"], f["name"]) for m in described.values() for f in m["fields"] if not f["help"]] == []


def test_the_table():
    lines = methods().stdout.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["method", "changes", "exports", "what it is"]
    assert {line.split()[0] for line in lines[1:] if line and line[0] != " "} > set(slimtune.methods.method_names())
    row = next(line for line in lines if line.startswith("lora "))
    assert re.split(r"\s{2,}", row.strip())[1:3] == ["linear, embedding", "file, merged, lora"]
    assert re.split(r"\s{2,}", next(line for line in lines if line.startswith("bottleneck ")))[2] == "file"
    assert max(map(len, methods(columns=80).stdout.splitlines())) <= 80


def test_fields_of_one_method():
    fields = {f["name"]: f for f in read_json("lora")["lora"]["fields"]}
    assert fields["r"] == {
        "name": "r", "expected": "an integer, at least 1", "default": "8", "recipe_default": "16",
        "short_name": "rank", "flag": "--rank", "help": "rank of the update; typically 4 to 64",
    }  # fmt: skip
    assert fields["lora_alpha"]["recipe_default"] == "32"
    assert "inference_mode" not in fields
    text = methods("LORA").stdout
    assert "\nr (rank, --rank)   an integer, at least 1; default 8; recipes: 16\n    rank of the update; typ" in text
    assert "bottleneck" not in text


def test_an_unknown_method():
    done = methods("botleneck", "--json")
    assert done.exit_code == 2
    assert "there is no method 'botleneck'; did you mean 'bottleneck'?" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prompt_tuning"])
def test_sizes_are_those_of_a_real_adapter(name, base, tmp_path):
    size = read_json(name, "--model", base)[name]
    cls = slimtune.methods.config_class(name)
    settings = fill_recipe_defaults({}, cls) | ({"prompt_tuning_init": "RANDOM"} if name == "prompt_tuning" else {})
    real = get_peft_model(llama(), cls(task_type="CAUSAL_LM", **settings))
    trained, total = real.get_nb_trainable_parameters()
    real.float().save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert size["trainable_params"] == trained
    assert size["trainable_percent"] == pytest.approx(100 * trained / total)
    assert size["adapter_bytes"] == sum(t.numel() * t.element_size() for t in tensors)


def test_sizes_of_all_methods(base):
    done = methods("--model", base)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["method", "trains", "%", "adapter"]
    assert next(line for line in lines if line.startswith("lora ")).split()[1:3] == ["14.8", "k"]
    assert {line.split()[0] for line in lines if line and line[0] != " "} > set(slimtune.methods.method_names())


def test_a_method_that_does_not_fit_the_base(tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, architectures=["MambaForCausalLM"])
    config.save_pretrained(tmp_path)
    unfit = read_json("bottleneck", "--model", str(tmp_path))["bottleneck"]
    assert "found 0 of the 2 layers of a MambaForCausalLM" in unfit["unfit"]
    assert "trainable_params" not in unfit
    done = methods("bottleneck", "--model", str(tmp_path))
    assert done.exit_code == 0
    assert "not with its defaults on this base: found 0 of the 2 layers" in done.stdout


def test_an_unknown_base():
    done = methods("lora", "--model", "smollm2-135")
    assert done.exit_code == 2
    assert "did you mean 'smollm2-135m'?" in done.stderr


def test_the_index_page_has_a_line_for_each_method(described):
    lines = [line for line in (DOCS / "README.md").read_text().splitlines() if line.startswith("- [")]
    built_in = slimtune.methods.built_in_methods()
    assert lines == [f"- [{name}]({name}.md): {described[name]['summary']}" for name in built_in]
    assert [name for name in built_in if not (DOCS / f"{name}.md").is_file()] == [], "pages that are missing"
