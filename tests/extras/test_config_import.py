"""Configs of other trainers become recipes, and each of their fields is accounted for."""

import dataclasses
import json

import pytest
import yaml
from published_configs import COMMANDS, YAML

from slimtune.core.config import load_recipe
from slimtune.errors import RecipeError, UsageError
from slimtune.extras.config_import.import_config import import_config

FILES = [(source, address) for kinds in (YAML, COMMANDS) for source, each in kinds.items() for address in each]
ROWS = {
    "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "kto": {"prompt": "a", "completion": "b", "label": True},
}


def write_config(folder, source, address):
    """Write one of the published configs as its trainer reads it."""
    if address in YAML.get(source, {}):
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(YAML[source][address]))
        return file, YAML[source][address]
    command, arguments = COMMANDS[source][address]
    words = [command]
    for name, value in arguments.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words.append(" ".join([f"--{name}", *(f"'{v}'" if "#" in str(v) else str(v) for v in values)]))
    (folder / "train.sh").write_text("# comment\nCUDA_VISIBLE_DEVICES=0 \\\n" + " \\\n    ".join(words) + "\n")
    return folder / "train.sh", arguments


def write(folder, values, name="config.yaml"):
    file = folder / name
    file.write_text(yaml.safe_dump(values))
    return file


def read(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.mark.parametrize(("source", "address"), FILES)
def test_published_config_becomes_a_recipe(tmp_path, source, address):
    file, values = write_config(tmp_path, source, address)
    result = import_config(file, tmp_path / "recipe.yaml")
    assert result.source == source
    assert {f.field for f in result.fields if not f.is_default} == {name.replace("-", "_") for name in values}
    assert [f.field for f in result.fields if f.outcome == "unknown"] == []
    assert all(f.settings or f.reason for f in result.fields)
    recipe = load_recipe(tmp_path / "recipe.yaml", extra_checks=lambda _: [])
    assert recipe.train.learning_rate == float(values.get("learning_rate") or values["learning-rate"])


def test_there_are_thirty_examples_of_five_trainers():
    assert (len(FILES), len({source for source, _ in FILES})) == (32, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "address"), FILES)
def test_recipe_plans(slimtune, tmp_path, tiny_folder, source, address):
    file, _ = write_config(tmp_path, source, address)
    import_config(file, tmp_path / "recipe.yaml")
    rows = tmp_path / "rows.jsonl"
    recipe = read(tmp_path)
    row = ROWS.get(recipe.get("task", {}).get("name"), {"prompt": "a", "completion": "b"})
    rows.write_text(f"{json.dumps(row)}\n" * 40)
    recipe["model"] = {"name": str(tiny_folder)}
    recipe["data"] = {"train": str(rows), "max_seq_len": 64}
    write(tmp_path, recipe, "recipe.yaml")
    done = slimtune("plan", tmp_path / "recipe.yaml", "--vram", "8GiB", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)


def test_llama_factory_in_numbers(tmp_path):
    address = next(a for a in YAML["llama-factory"] if a.endswith("otfq.yaml"))
    file, _ = write_config(tmp_path, "llama-factory", address)
    result = import_config(file, tmp_path / "recipe.yaml")
    recipe = read(tmp_path)
    model = {"name": "meta-llama/Meta-Llama-3-8B-Instruct", "dtype": "bfloat16", "quantization": "nf4"}
    assert (recipe["model"], recipe["data"]["on_overlong"]) == (model, "truncate")
    method = {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    assert recipe["method"] == method
    assert (recipe["train"]["batch_size"], recipe["train"]["gradient_checkpointing"]) == (1, True)
    assert {f.field for f in result.fields if f.is_default} >= {"lora_rank", "lora_alpha"}
    assert [f.field for f in result.fields if f.outcome == "no-equivalent"] == ["max_samples"]


def test_ratio_of_lora_plus_is_taken(tmp_path):
    file = write(tmp_path, {"model_name_or_path": "x/y", "stage": "sft", "dataset": "mine", "loraplus_lr_ratio": 16})
    import_config(file, tmp_path / "recipe.yaml")
    assert read(tmp_path)["method"]["lr_ratio"] == 16


def test_files_of_dataset_info_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "a.json"}}')
    file = write(tmp_path, {"model_name_or_path": "x/y", "stage": "sft", "dataset": "mine", "cutoff_len": 64})
    import_config(file, tmp_path / "recipe.yaml")
    assert read(tmp_path)["data"]["train"] == str(tmp_path / "data" / "a.json")


def test_defaults_of_trl_are_those_of_the_package():
    trl = pytest.importorskip("trl")
    from slimtune.extras.config_import import trl_arguments

    for config, task in ((trl.SFTConfig, "sft"), (trl.DPOConfig, "dpo"), (trl.KTOConfig, "kto")):
        fields = {f.name: f.default for f in (*dataclasses.fields(config), *dataclasses.fields(trl.ModelConfig))}
        for name, value in trl_arguments.DEFAULTS.items():
            ours = value({"trl:task": task}) if callable(value) else value
            assert ours == fields.get(name, ours), (task, name)


def test_scale_of_mlx_is_alpha_by_rank(tmp_path):
    file, _ = write_config(tmp_path, "mlx-lm", next(iter(YAML["mlx-lm"])))
    import_config(file, tmp_path / "recipe.yaml")
    method = read(tmp_path)["method"]
    assert (method["r"], method["lora_alpha"], method["target_modules"]) == (8, 160, ["q_proj", "v_proj"])


def test_notebook_by_its_adapter_and_state(tmp_path):
    folder = tmp_path / "checkpoint-60"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit", "r": 16, "lora_alpha": 16}
    config |= {"lora_dropout": 0, "target_modules": ["v_proj", "q_proj"], "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {"num_train_epochs": 1, "train_batch_size": 2, "log_history": [{"learning_rate": 2e-4}, {"loss": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    result = import_config(folder, tmp_path / "recipe.yaml")
    recipe = read(tmp_path)
    assert result.source == "unsloth"
    assert recipe["model"] == {"name": "unsloth/llama-3-8b", "quantization": "nf4"}
    assert (recipe["train"]["learning_rate"], recipe["train"]["batch_size"]) == (2e-4, 2)


def test_unknown_field_is_named(tmp_path):
    file = write(tmp_path, {"base_model": "x/y", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], "adapter": "lora",
                            "learning_rate": 1e-4, "lora_rr": 8})  # fmt: skip
    fields = import_config(file, tmp_path / "recipe.yaml").fields
    assert [(f.field, "lora_r" in f.reason) for f in fields if f.outcome == "unknown"] == [("lora_rr", True)]


@pytest.mark.parametrize(("values", "error"), [
    ({"model_name_or_path": "x/y", "stage": "ppo", "dataset": "a"}, RecipeError),
    ({"base_model": "x/y", "datasets": [{"path": "a"}], "adapter": "lora", "rl": "grpo", "lora_r": 8}, RecipeError),
    ({"model_name_or_path": "x/y", "stage": "sft", "dataset": "a", "learning_rate": [1]}, RecipeError),
    ({"stage": "sft", "cutoff_len": 8}, RecipeError), ({"colour": "red"}, UsageError),
    ({"model_name_or_path": "x/y", "stage": "sft", "dataset": "a", "lora_rank": -3}, RecipeError),
])  # fmt: skip
def test_what_cannot_be_imported_is_one_error(tmp_path, values, error):
    with pytest.raises(error) as caught:
        import_config(write(tmp_path, values), tmp_path / "recipe.yaml")
    assert caught.value.message
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b\n", "\0", "a: &a [*a]"])
def test_damaged_file_is_one_error(slimtune, tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    done = slimtune("import", tmp_path / "config.yaml", "--out", tmp_path / "recipe.yaml")
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


def test_recipe_that_exists_is_not_overwritten(slimtune, tmp_path):
    file, _ = write_config(tmp_path, "trl", next(iter(YAML["trl"])))
    (tmp_path / "recipe.yaml").write_text("mine")
    done = slimtune("import", file, "--out", tmp_path / "recipe.yaml")
    assert (done.exit_code, (tmp_path / "recipe.yaml").read_text()) == (2, "mine")


def test_command_prints_each_field(slimtune, tmp_path):
    file, values = write_config(tmp_path, "trl", next(iter(YAML["trl"])))
    done = slimtune("import", file, "--out", tmp_path / "recipe.yaml")
    assert done.exit_code == 0
    assert all(f"  {name}: " in done.stdout for name in values)
