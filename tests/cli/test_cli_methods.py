"""`slimtune methods`: read from the classes, sized on a base that is never loaded; and the methods' index page."""

from __future__ import annotations

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
from slimtune.config.method import resolved

DOCS = Path(__file__).parents[2] / "docs/methods"


def methods(*args: str):
    return CliRunner().invoke(app, ["methods", *args], env={"COLUMNS": "200"})


def said(*args: str) -> dict:
    done = methods(*args, "--json")
    assert done.exit_code == 0, done.stderr
    return {m["name"]: m for m in json.loads(done.stdout)["methods"]}


@pytest.fixture
def base(tmp_path) -> str:
    """A folder with a config and no weights."""
    llama().config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture(scope="module")
def every() -> dict:
    return said()


def test_every_method_is_there_as_its_class_says(every):
    assert list(every) == list(slimtune.methods.method_names())
    for name, method in every.items():
        cls = slimtune.methods.config_class(name)
        assert method["summary"]
        assert method["sites"] == list(cls.kinds)
        ships = method["export_formats"]
        assert (ships["merged_model"], ships["ollama_merged"]) == (cls.mergeable, cls.mergeable)
        assert (ships["ollama_adapter"], ships["vllm_adapter"]) == (cls.ships_as_lora, cls.ships_as_lora)
        assert ships["hugging_face_file"] is True


def test_every_field_says_what_it_is(every):
    vague = [(m["name"], f["name"]) for m in every.values() for f in m["fields"] if not f["about"]]
    assert vague == []


def test_one_table_without_a_name():
    lines = methods().stdout.splitlines()
    assert lines[0].split() == ["method", "sites", "export_formats", "as", "what", "it", "changes"]
    assert {line.split()[0] for line in lines[1:] if line and line[0] != " "} > set(slimtune.methods.method_names())
    row = next(line for line in lines if line.startswith("lora "))
    assert re.split(r"\s{2,}", row.strip()) == [
        "lora", "linear, embedding", "file; merged; adapter in Ollama, vLLM",
        "LoRA: low-rank matrices beside frozen linear maps",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", next(line for line in lines if line.startswith("bottleneck ")))[2] == "file"


def test_one_methods_fields():
    fields = {f["name"]: f for f in said("lora")["lora"]["fields"]}
    assert fields["r"] == {
        "name": "r", "type": "int", "default": "8", "recipe_default": "16", "short_name": "rank", "flag": "--rank",
        "about": "rank, 1 and up; typically 4 to 64.",
    }  # fmt: skip
    assert fields["lora_alpha"]["recipe_default"] == "32"
    assert "every linear map except the output head" in fields["target_modules"]["about"]
    assert "inference_mode" not in fields


def test_one_methods_fields_are_shown():
    shown = methods("LORA").stdout
    assert "\nr (rank, --rank)   default 8; recipes start from 16\n    rank, 1 and up; typically 4 to 64.\n" in shown
    assert "target_modules (targets)   default None; recipes start from 'all-linear'" in shown
    assert "bottleneck" not in shown


def test_an_unknown_method():
    done = methods("botleneck")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no method 'botleneck'; did you mean 'bottleneck'?" in done.stderr
    assert json.loads(methods("botleneck", "--json").stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prompt_tuning"])
def test_sizes_are_those_of_the_real_adapter(name, base, tmp_path):
    size = said(name, "--model", base)[name]
    cls = slimtune.methods.config_class(name)
    settings = {**resolved({}, cls), **({"prompt_tuning_init": "RANDOM"} if name == "prompt_tuning" else {})}
    real = get_peft_model(llama(), cls(task_type="CAUSAL_LM", **settings))
    trained, total = real.get_nb_trainable_parameters()
    real.float().save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert size["trainable_params"] == trained
    assert size["trainable_percent"] == pytest.approx(100 * trained / total)
    assert size["adapter_bytes"] == sum(t.numel() * t.element_size() for t in held)


def test_sizes_of_all_methods_in_one_table(base):
    done = methods("--model", base)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["method", "trains", "%", "adapter"]
    row = next(line for line in lines if line.startswith("lora "))
    assert row.split()[1:3] == ["14.8", "k"]
    assert {line.split()[0] for line in lines if line and line[0] != " "} > set(slimtune.methods.method_names())


def test_a_method_that_does_not_fit_says_so_in_its_row(tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, architectures=["MambaForCausalLM"])
    config.save_pretrained(tmp_path)
    unfit = said("bottleneck", "--model", str(tmp_path))["bottleneck"]
    assert "found 0 of the 2 layers of a MambaForCausalLM" in unfit["unfit"]
    assert "trainable_params" not in unfit
    done = methods("bottleneck", "--model", str(tmp_path))
    assert done.exit_code == 0
    assert "not with its defaults on this base: found 0 of the 2 layers" in done.stdout


def test_a_base_that_does_not_exist():
    done = methods("lora", "--model", "smollm2-135")
    assert done.exit_code == 2
    assert "did you mean 'smollm2-135m'?" in done.stderr


def test_the_index_page_has_a_line_for_each_method(every):
    lines = [line for line in (DOCS / "README.md").read_text().splitlines() if line.startswith("- [")]
    built_in = slimtune.methods.built_in_methods()
    assert lines == [f"- [{name}]({name}.md): {every[name]['summary']}" for name in built_in]
    assert [name for name in built_in if not (DOCS / f"{name}.md").is_file()] == [], "pages that are missing"
