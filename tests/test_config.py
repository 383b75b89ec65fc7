"""A recipe: read from YAML and flags; every fault is named, all at once, with its path and what is wanted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slimtune.config import Recipe, load_recipe, set_path
from slimtune.config.errors import fields_of, flag_of
from slimtune.errors import RecipeError, UsageError
from slimtune.methods.lora import LoraConfig

LEAST = {"model": "smollm2-135m", "data": "rows.jsonl", "output_dir": "runs/x"}
ROOT = Path(__file__).parent.parent


def recipe_of(**changes) -> Recipe:
    return Recipe.from_dict({**LEAST, **changes})


def said(**changes) -> str:
    with pytest.raises(RecipeError) as e:
        recipe_of(**changes)
    assert e.value.exit_code == 2
    return str(e.value)


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_least_recipe_gets_what_serves():
    recipe = recipe_of()
    assert (recipe.model.name, recipe.data.train, recipe.output_dir) == (
        "smollm2-135m",
        Path.cwd() / "rows.jsonl",
        Path("runs/x"),
    )
    config = recipe.method_config()
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.packing) == (3.0, 2e-4, True)


def test_the_class_keeps_pefts_defaults():
    assert (LoraConfig().r, LoraConfig().lora_alpha, LoraConfig().target_modules) == (8, 8, None)


@pytest.mark.parametrize(
    ("method", "r", "alpha"),
    [("lora", 16, 32), ({"rank": 4}, 4, 8), ({"name": "lora", "r": 4, "alpha": 5}, 4, 5), ({"name": "LORA"}, 16, 32)],
)
def test_short_names_and_alpha_from_the_rank(method, r, alpha):
    config = recipe_of(method=method).method_config()
    assert (config.r, config.lora_alpha) == (r, alpha)


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        recipe_of().train.epochs = 1


def test_all_faults_are_reported_at_once():
    text = said(
        output_dir=None,
        epochs=3,
        zzz=1,
        model={"name": "x", "dtype": "bf17"},
        data={"train": "x", "on_overlong": "cut"},
        method={"name": "lora", "dropot": 1, "lora_dropout": 2, "bias": "some", "r": "many"},
        train={"epocs": 1, "batch_size": 0, "learning_rate": "fast"},
    )
    assert "the recipe holds 12 faults" in text
    for line in (
        "output_dir: missing (flag --out); expected: the run folder",
        "epochs: no such field; did you mean 'train.epochs'?",
        "zzz: no such field; expected: one of 'model', 'data', 'method', 'train', 'output_dir'",
        "model.dtype: got 'bf17'; expected: dtype of the frozen weights: auto, float32",
        "data.on_overlong: got 'cut'; expected: what happens to a longer row: error, drop or truncate",
        "method.dropot: no such field; did you mean 'dropout'?",
        "method.lora_dropout: got 2; expected: a probability in [0, 1)",
        "method.bias: got 'some'; expected: one of 'none', 'all', 'lora_only'",
        "method.r: got 'many'; expected: a whole number",
        "train.epocs: no such field; did you mean 'epochs'?",
        "train.batch_size: got 0; expected: rows in a batch, a whole number from 1; times accumulate they make",
        "train.learning_rate: got 'fast'; expected: the highest rate, above 0",
    ):
        assert f"\n  {line}" in text
    assert "hint: correct it there" in text


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "name", ""),
        ("model", "name", 5),
        ("model", "device", "gpu"),
        ("model", "trust_remote_code", "yes"),
        ("model", "revision", 12),
        ("data", "train", ["a", "b"]),
        ("data", "validation_fraction", 0.6),
        ("data", "max_seq_len", 1),
        ("data", "max_seq_len", 10.5),
        ("train", "epochs", 0),
        ("train", "epochs", float("inf")),
        ("train", "epochs", True),
        ("train", "max_steps", 0),
        ("train", "learning_rate", -1e-4),
        ("train", "learning_rate", float("nan")),
        ("train", "batch_size", True),
        ("train", "gradient_accumulation_steps", 0),
        ("train", "packing", "no"),
        ("train", "lr_scheduler", "cosin"),
        ("train", "warmup_ratio", 1),
        ("train", "weight_decay", -1),
        ("train", "max_grad_norm", -1),
        ("train", "optimizer", "sgd"),
        ("train", "seed", 2**32),
        ("train", "eval_steps", 0),
        ("train", "save_total_limit", 0),
        ("train", "early_stopping_patience", 0),
        ("train", "logging_steps", 0),
        ("train", "report_to", ["wandbb"]),
        ("train", "report_to", "wandb"),
    ],
)
def test_a_value_out_of_range_or_type_is_named_with_what_is_wanted(section, field, value):
    needed = {"model": {"name": "m"}, "data": {"train": "t"}}.get(section, {})
    text = said(**{section: {**needed, field: value}})
    wanted = dict(fields_of(Recipe))[f"{section}.{field}"].description
    assert f"{section}.{field}: got " in text
    assert f"expected: {wanted}" in text


def test_sections_of_the_wrong_kind():
    text = said(train=[1], method=[2])
    assert "train: got [1]; expected: a section with 'epochs'" in text
    assert "method.name: there is no method [2]; expected: one of" in text
    with pytest.raises(RecipeError, match=r"the recipe holds \[1\]"):
        Recipe.from_dict([1])


def test_an_unknown_method_is_named_beside_the_other_faults():
    text = said(method={"name": "lore", "rank": 3}, train={"epochs": 0})
    assert "method.name: there is no method 'lore'; did you mean 'lora'?" in text
    assert "train.epochs: got 0" in text


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({"r": 0}, "method.r: got 0; expected: a whole number, 1 and up"),
        ({"r": True}, "method.r: got True; expected: a whole number"),
        ({"r": 4, "rank": 5}, "method.rank: given twice, as r and by a short name"),
        ({"target_modules": 5}, "method.target_modules: got 5; expected: "),
        ({"rank_pattern": {"q_proj": "x"}}, "method.rank_pattern: got {'q_proj': 'x'}"),
        ({"modules_to_save": "head"}, "method.modules_to_save: got 'head'"),
        ({"inference_mode": True}, "method.inference_mode: no such field"),
        ({"task_type": "CHAT"}, "method.task_type: got 'CHAT'"),
        ({"layers_to_transform": [0]}, "method.layers_to_transform: got [0]; expected: None where target_modules is"),
    ],
)
def test_faults_of_the_method(method, line):
    assert line in said(method=method)


def test_each_range_fault_of_the_method_is_found():
    text = said(method={"r": 0, "lora_dropout": 1.5, "init_lora_weights": "pissaa"})
    assert "3 faults" in text


def test_stopping_early_needs_validation_rows():
    data = {"train": "x", "validation_fraction": 0}
    assert "train.early_stopping_patience: got 2, but there are no validation rows" in said(
        data=data, train={"early_stopping_patience": 2}
    )
    assert (
        recipe_of(data={**data, "validation": "v"}, train={"early_stopping_patience": 2}).train.early_stopping_patience
        == 2
    )


# --- YAML


def test_numbers_as_people_write_them(tmp_path):
    path = written(tmp_path, "model: m\ndata: d\noutput_dir: o\ntrain: {learning_rate: 2e-4, weight_decay: '1e-2'}\n")
    assert (load_recipe(path).train.learning_rate, load_recipe(path).train.weight_decay) == (2e-4, 1e-2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\ndata: [a\noutput_dir: o\n", ("line 3, column 11", "look at: output_dir: o")),
        ("model: m\n  data: d\n", ("line 2, column 7", "look at: data: d")),
        ("model: m\nmodel: n\n", ("line 2, column 1: 'model' is given twice", "look at: model: n")),
        ("train:\n  epochs: 1\n  epochs: 2\n", ("line 3, column 3: 'epochs' is given twice",)),
        ("a: [", ("line 1, column 5", "look at: a: [")),
        ("a: \x00", ("is not YAML",)),
        ("a: !!python/object:os.system x\n", ("line 1, column 4", "could not determine a constructor")),
        ("- model\n", ("holds ['model']", "a mapping with model, data and output_dir")),
    ],
)
def test_yaml_that_does_not_parse_is_placed(tmp_path, text, parts):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as e:
        load_recipe(path)
    assert e.value.exit_code == 2
    assert str(path) in str(e.value)
    for part in parts:
        assert part in str(e.value)


def test_a_key_repeated_through_a_merge_is_no_fault(tmp_path):
    tree = "model: m\ndata: d\noutput_dir: o\ntrain:\n  <<: {epochs: 1, seed: 3}\n  epochs: 2\n"
    recipe = load_recipe(written(tmp_path, tree, "c.yaml"))
    assert (recipe.train.epochs, recipe.train.seed) == (2.0, 3)


def test_an_empty_recipe_says_all_that_is_missing_and_the_flags(tmp_path):
    for recipe, source in ((written(tmp_path, "# nothing\n"), "recipe.yaml"), (None, "what the flags say")):
        with pytest.raises(RecipeError) as e:
            load_recipe(recipe)
        for part in (source, "3 faults", "model.name: missing (flag --model)", "data.train: missing (flag --data)",
                     "output_dir: missing (flag --out)"):  # fmt: skip
            assert part in str(e.value)


def test_empty_sections_are_as_if_not_there(tmp_path):
    recipe = load_recipe(written(tmp_path, "model: m\ndata: d\noutput_dir: o\ntrain:\nmethod:\n"))
    assert recipe.train.epochs == 3.0


def test_files_that_are_no_recipe(tmp_path):
    written(tmp_path, "", "tone.yaml")
    with pytest.raises(UsageError, match=r"there is no recipe file .*tonee.yaml.*did you mean 'tone.yaml'"):
        load_recipe(tmp_path / "tonee.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not text"):
        load_recipe(tmp_path / "b.yaml")


# --- paths


def test_relative_paths_mean_the_file_beside_the_recipe_else_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes/base").mkdir(parents=True)
    (tmp_path / "recipes/a.jsonl").touch()
    (tmp_path / "recipes/smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    path = written(
        tmp_path / "recipes", "model: ./base\ndata: {train: a.jsonl, validation: b.jsonl}\noutput_dir: runs/x\n"
    )
    recipe = load_recipe(path)
    assert recipe.data.train == tmp_path / "recipes/a.jsonl"
    assert recipe.data.validation == tmp_path / "b.jsonl"
    assert recipe.model.name == str(tmp_path / "recipes/base")
    assert recipe.output_dir == Path("runs/x")
    # An alias is no path, and a Hub id that is no folder stays one.
    assert load_recipe(path, {"model": "smollm2-135m"}).model.name == "smollm2-135m"
    assert load_recipe(path, {"model": "org/base"}).model.name == "org/base"
    # A flag's path is the working folder's.
    assert load_recipe(path, {"data.train": "a.jsonl"}).data.train == tmp_path / "a.jsonl"


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(None, {**LEAST, "data": "~/rows.jsonl", "output_dir": "~/run"})
    assert (str(recipe.data.train), str(recipe.output_dir)) == ("/home/someone/rows.jsonl", "/home/someone/run")


def test_missing_data_files_are_named_all_at_once(tmp_path):
    (tmp_path / "train.jsonl").touch()
    recipe = load_recipe(
        None, {**LEAST, "data": {"train": str(tmp_path / "trian.jsonl"), "test": str(tmp_path / "no/t.jsonl")}}
    )
    with pytest.raises(RecipeError) as e:
        recipe.require_files()
    assert "2 faults" in str(e.value)
    assert "trian.jsonl'; did you mean 'train.jsonl'?" in str(e.value)
    assert "data.test: there is no file" in str(e.value)
    load_recipe(None, {**LEAST, "data": str(tmp_path / "train.jsonl")}).require_files()


# --- overrides


def test_overrides_win_over_the_file(tmp_path):
    path = written(
        tmp_path, "model: m\ndata: d\noutput_dir: o\nmethod: {r: 4, dropout: 0.1}\ntrain: {epochs: 2, seed: 1}\n"
    )
    recipe = load_recipe(
        path, ["train.epochs=1", "method.rank=8", "model.dtype=fp32", "train.report_to=[wandb]", "output_dir=p"]
    )
    config = recipe.method_config()
    assert (recipe.train.epochs, recipe.train.seed, recipe.output_dir) == (1.0, 1, Path("p"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert (recipe.model.name, recipe.model.dtype, recipe.train.report_to) == ("m", "float32", ["wandb"])
    assert load_recipe(path, {"method.rank": 8, "model": "n"}).model.name == "n"


def test_a_patterns_key_may_hold_dots():
    recipe = load_recipe(None, {**LEAST, "method.rank_pattern.layers.0.q_proj": 4})
    assert recipe.method_config().rank_pattern == {"layers.0.q_proj": 4}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.epochs", "--set got 'train.epochs'"),
        ("=3", "--set got '=3'"),
        ("train.epochs=[", "--set train.epochs, line 1"),
        ("train.epochs=zero", "train.epochs: got 'zero'"),
        ("train.epochss=1", "train.epochss: no such field; did you mean 'epochs'?"),
        ("trian.epochs=1", "trian: no such field; did you mean 'train'?"),
        ("output_dir.x=1", "--set output_dir.x: 'output_dir' is 'runs/x'"),
        ("method.rnk=1", "method.rnk: no such field; did you mean 'rank'?"),
        ("method=loraa", "method.name: there is no method 'loraa'; did you mean 'lora'?"),
        ("rank=3", "rank: no such field; did you mean 'method.rank'?"),
    ],
)
def test_faulty_overrides(override, part):
    with pytest.raises(RecipeError) as e:
        load_recipe(None, [*(f"{k}={v}" for k, v in LEAST.items()), override])
    assert part in str(e.value)
    assert e.value.exit_code == 2


def test_set_path_reads_values_as_yaml():
    tree: dict = {"model": "m"}
    texts = {"train.epochs": "3", "train.packing": "false", "train.learning_rate": "1e-5", "data": "x"}
    for path, value in {**texts, "train.report_to": "[]", "model.dtype": "fp32", "train.max_steps": "null"}.items():
        set_path(tree, path, value)
    assert tree == {
        "model": {"name": "m", "dtype": "fp32"},
        "data": {"train": "x"},
        "train": {"epochs": 3, "packing": False, "learning_rate": 1e-5, "report_to": [], "max_steps": None},
    }


def test_the_given_tree_is_not_changed():
    tree = {**LEAST, "method": {"rank": 3}}
    Recipe.from_dict(tree)
    assert tree == {**LEAST, "method": {"rank": 3}}


@given(
    rank=st.integers(1, 512),
    rate=st.floats(1e-12, 10, allow_nan=False),
    fraction=st.floats(0, 0.5),
    name=st.text(min_size=1),
    steps=st.none() | st.integers(1, 10**9),
)
def test_a_written_recipe_reads_back_equal(rank, rate, fraction, name, steps):
    recipe = Recipe.from_dict(
        {"model": name, "data": {"train": "t", "validation_fraction": fraction}, "method": {"rank": rank}, "output_dir": "o",
         "train": {"learning_rate": rate, "max_steps": steps}}
    )  # fmt: skip
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", ["\x85", "a\u2028b", "\u2029 c", "ü", "'\"", "5", "null"])
def test_awkward_names_read_back_equal(name):
    recipe = Recipe.from_dict({"model": name, "data": {"train": "t"}, "output_dir": "o"})
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).model.name == name


def test_a_written_file_reads_back_equal(tmp_path):
    recipe = load_recipe(None, {**LEAST, "train.learning_rate": 1e-05})
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


# --- what is documented


def test_the_demos_recipe_is_sound():
    recipe = load_recipe(ROOT / "examples/devils-dictionary.yaml")
    assert recipe.data.train == ROOT / "examples/devils-dictionary/train.jsonl"
    assert (recipe.method_config().r, recipe.method_config().lora_alpha) == (16, 32)
    assert not os.path.isabs(recipe.output_dir)


def test_every_field_stands_in_the_documentation():
    page = (ROOT / "docs/recipe.md").read_text()
    for path, info in fields_of(Recipe):
        default = "needed" if info.is_required() else yaml.safe_dump(info.default).splitlines()[0]
        flag = f"`{flag_of(info)}`" if flag_of(info) else ""
        assert f"| `{path}` | {default} | {info.description} | {flag} |" in page


def test_one_wrong_value_of_a_needed_field_is_one_fault():
    with pytest.raises(RecipeError) as fault:
        Recipe.from_dict({**LEAST, "method": {"name": "prompt_tuning", "num_virtual_tokens": 0}})
    assert "holds a fault" in str(fault.value)
    assert "num_virtual_tokens: got 0" in str(fault.value)


def test_a_method_brings_its_learning_rate():
    assert Recipe.from_dict({**LEAST, "method": "prompt_tuning"}).train.learning_rate == 3e-2
    given = {**LEAST, "method": "prompt_tuning", "train": {"learning_rate": 1e-3}}
    assert Recipe.from_dict(given).train.learning_rate == 1e-3
