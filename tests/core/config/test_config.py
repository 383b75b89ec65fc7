"""The recipe: read from YAML and flags; all errors are named at once, each with its path and what is expected."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.config import Recipe, load_recipe
from slimtune.core.foundation.strict_yaml import parse_yaml
from slimtune.errors import RecipeError, UsageError
from slimtune.extras.row_files import list_missing_data_file_errors
from slimtune.methods.lora import LoraConfig

MINIMAL = {"model": "smollm2-135m", "data": "rows.jsonl", "output_dir": "runs/x"}
MINIMAL_TEXT = "model: m\ndata: d\noutput_dir: o\n"
ROOT = Path(__file__).parents[3]


def make_recipe(**changes) -> Recipe:
    return Recipe.from_dict({**MINIMAL, **changes})


def error_text(**changes) -> str:
    with pytest.raises(RecipeError) as e:
        make_recipe(**changes)
    assert e.value.exit_code == 2
    return str(e.value)


@pytest.fixture
def write(tmp_path):
    """Return `write(text) -> path` of a recipe file."""

    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_recipe


# --- defaults


def test_defaults():
    recipe = make_recipe()
    assert (recipe.model.name, recipe.data.train) == ("smollm2-135m", Path.cwd() / "rows.jsonl")
    assert recipe.output_dir == Path("runs/x")
    config = recipe.method_config()
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.packing) == (3.0, "auto", None)
    assert (LoraConfig().r, LoraConfig().lora_alpha, LoraConfig().target_modules) == (8, 8, None), "PEFT's own"
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.epochs = 1


@pytest.mark.parametrize(
    ("method", "r", "alpha"),
    [("lora", 16, 32), ({"rank": 4}, 4, 8), ({"name": "lora", "r": 4, "alpha": 5}, 4, 5), ({"name": "LORA"}, 16, 32)],
)
def test_short_names_and_alpha_from_the_rank(method, r, alpha):
    config = make_recipe(method=method).method_config()
    assert (config.r, config.lora_alpha) == (r, alpha)


# --- errors


def test_all_errors_at_once():
    text = error_text(
        output_dir=None,
        epochs=3,
        zzz=1,
        model={"name": "x", "dtype": "bf17"},
        data={"train": "x", "on_overlong": "cut"},
        method={"name": "lora", "dropot": 1, "lora_dropout": 2, "bias": "some", "r": "many"},
        train={"epocs": 1, "batch_size": 0, "learning_rate": "fast"},
    )
    assert "12 problems" in text
    for line in (
        "output_dir: missing (flag --out); expected: run folder",
        "epochs: no such field; did you mean 'train.epochs'?",
        "zzz: no such field; expected: one of 'model', 'data', 'task', 'method', 'train', 'output_dir'",
        "model.dtype: got 'bf17'; did you mean 'bfloat16'?; expected: one of auto, float32, bfloat16",
        "data.on_overlong: got 'cut'; expected: one of error, drop, truncate",
        "method.dropot: no such field; did you mean 'dropout'?",
        "method.lora_dropout: got 2; expected: a number, at least 0 and below 1",
        "method.bias: got 'some'; did you mean 'none'?; expected: one of 'none', 'all', 'lora_only'",
        "method.r: got 'many'; expected: an integer, at least 1",
        "train.epocs: no such field; did you mean 'epochs'?",
        "train.batch_size: got 0; expected: an integer, at least 1",
        "train.learning_rate: got 'fast'; did you mean 'auto'?; expected: auto or a number, above 0",
    ):
        assert f"\n  {line}" in text
    assert "\n  hint: " in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.name", ""),
        ("model.device", "gpu"),
        ("model.trust_remote_code", "yes"),
        ("model.revision", 12),
        ("data.train", ["a", "b"]),
        ("data.validation_fraction", 0.6),
        ("data.max_seq_len", 10.5),
        ("train.epochs", float("inf")),
        ("train.epochs", True),
        ("train.learning_rate", float("nan")),
        ("train.batch_size", True),
        ("train.max_tokens_per_micro_batch", 0),
        ("train.warmup_ratio", 1),
        ("train.seed", 2**32),
        ("train.report_to", ["wandbb"]),
        ("train.report_to", "wandb"),
    ],
)
def test_wrong_value(path, value):
    section, name = path.split(".")
    required = {"model": {"name": "m"}, "data": {"train": "t"}}.get(section, {})
    text = error_text(**{section: {**required, name: value}})
    assert ": 1 problem:" in text
    assert f"{path}: got " in text
    expected = {s.path: s.expected for s in list_settings(Recipe)}[path]
    assert f"expected: {expected}" in text


def test_sections_of_the_wrong_type():
    text = error_text(train=[1], method=[2])
    assert re.search(r"\btrain: .*\[1\].*'epochs'", text)
    assert re.search(r"\bmethod\.name: .*\[2\]", text)
    with pytest.raises(RecipeError, match=r"\[1\]"):
        Recipe.from_dict([1])


@pytest.mark.parametrize(
    ("method", "lines"),
    [
        ({"name": "lore", "rank": 3}, ["method.name: there is no method 'lore'; did you mean 'lora'?"]),
        ({"r": True}, ["method.r: got True; expected: an integer"]),
        ({"r": 4, "rank": 5}, ["method.rank: given twice, also as r"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["method.rank_pattern: got {'q_proj': 'x'}"]),
        ({"inference_mode": True}, ["method.inference_mode: no such field"]),
        ({"layers_to_transform": [0]}, ["method.layers_to_transform: `layers_to_transform` cannot be used when"]),
        ({"r": 0, "lora_dropout": 1.5}, ["2 problems", "method.r: got 0", "got 1.5"]),
        ({"init_lora_weights": "pissaa"}, ["method.init_lora_weights: got 'pissaa'"]),
        # A required field has one error, not two.
        ({"name": "prompt_tuning", "num_virtual_tokens": 0}, [": 1 problem:", "num_virtual_tokens: got 0"]),
    ],
)
def test_errors_of_the_method(method, lines):
    text = error_text(method=method)
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train": {"offload_activations": True}}, "train.offload_activations: got true, but no"),
        ({"train": {"compile": True, "fsdp": True}}, "train.compile: got true, and train.fsdp is true"),
        ({"method": {"init_lora_weights": "loftq"}}, "method.init_lora_weights: got 'loftq'"),
        (
            {"data": {"train": "x", "validation_fraction": 0}, "train": {"early_stopping_patience": 2}},
            "train.early_stopping_patience: got 2, but there are no validation rows",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes, line):
    assert line in error_text(**changes)


def test_contradictions_are_named_beside_other_errors():
    text = error_text(output_dir=None, zzz=1, method={"r": 0}, train={"compile": True, "fsdp": True})
    assert [line.partition(":")[0].strip() for line in text.splitlines()[1:5]] == [
        "output_dir", "zzz", "method.r", "train.compile",
    ]  # fmt: skip


# --- YAML


def test_yaml_numbers_merges_and_empty_sections(write):
    recipe = load_recipe(write(MINIMAL_TEXT + "train: {learning_rate: 2e-4, weight_decay: '1e-2'}\nmethod:\n"))
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.method.name) == (2e-4, 1e-2, "lora")
    recipe = load_recipe(write(MINIMAL_TEXT + "train:\n  <<: {epochs: 1, seed: 3}\n  epochs: 2\n"))
    assert (recipe.train.epochs, recipe.train.seed) == (2.0, 3), "a key may repeat one of a merge"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\ndata: [a\noutput_dir: o\n", ("line 3, column 11", "look at: output_dir: o")),
        ("train:\n  epochs: 1\n  epochs: 2\n", ("line 3, column 3: 'epochs' is given twice",)),
        ("a: [", ("line 1, column 5", "look at: a: [")),
        ("a: \x00", ("is not YAML",)),
        ("a: !!python/object:os.system x\n", ("line 1, column 4", "could not determine a constructor")),
        ("- model\n", ("is ['model']", "a mapping with model, data and output_dir")),
        ("# nothing\n", ("3 problems", "(flag --model)", "(flag --data)", "(flag --out)")),
    ],
)
def test_wrong_yaml(write, text, parts):
    path = write(text)
    with pytest.raises(RecipeError) as e:
        load_recipe(path)
    assert [part for part in (str(path), *parts) if part not in str(e.value)] == []


def test_files_that_are_not_recipes(tmp_path, write):
    write("", "tone.yaml")
    with pytest.raises(UsageError, match=r"tonee\.yaml.*'tone\.yaml'"):
        load_recipe(tmp_path / "tonee.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"b\.yaml .*text"):
        load_recipe(tmp_path / "b.yaml")


# --- paths


def test_relative_paths(tmp_path, write, monkeypatch):
    (tmp_path / "recipes/base").mkdir(parents=True)
    (tmp_path / "recipes/a.jsonl").touch()
    (tmp_path / "recipes/smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "model: ./base\ndata: {train: a.jsonl, validation: b.jsonl}\noutput_dir: runs/x\n"
    path = write(text, "recipes/recipe.yaml")
    recipe = load_recipe(path)
    assert recipe.data.train == tmp_path / "recipes/a.jsonl"  # beside the recipe
    assert recipe.data.validation == tmp_path / "b.jsonl"  # not there: in the working folder
    assert recipe.model.name == str(tmp_path / "recipes/base")
    assert recipe.output_dir == Path("runs/x")
    # An alias is not a path, and a Hub id that is not a folder stays one.
    assert load_recipe(path, {"model": "smollm2-135m"}).model.name == "smollm2-135m"
    assert load_recipe(path, {"model": "org/base"}).model.name == "org/base"
    # A flag's path is relative to the working folder.
    assert load_recipe(path, {"data.train": "a.jsonl"}).data.train == tmp_path / "a.jsonl"
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(None, {**MINIMAL, "data": "~/rows.jsonl", "output_dir": "~/run"})
    assert (str(recipe.data.train), str(recipe.output_dir)) == ("/home/someone/rows.jsonl", "/home/someone/run")


def test_missing_data_files(tmp_path):
    (tmp_path / "train.jsonl").touch()
    data = {"train": str(tmp_path / "trian.jsonl"), "test": str(tmp_path / "no/t.jsonl")}
    with pytest.raises(RecipeError) as e:
        Recipe.from_dict({**MINIMAL, "data": data}, extra_checks=list_missing_data_file_errors)
    for part in ("2 problems", "trian.jsonl'; did you mean 'train.jsonl'?", "data.test: there is no file"):
        assert part in str(e.value)
    data = {"train": str(tmp_path / "train.jsonl")}
    Recipe.from_dict({**MINIMAL, "data": data}, extra_checks=list_missing_data_file_errors)


# --- overrides


def test_overrides(write):
    path = write(MINIMAL_TEXT + "method: {r: 4, dropout: 0.1}\ntrain: {epochs: 2, seed: 1}\n")
    overrides = ["train.epochs=1", "method.rank=8", "model.dtype=fp32", "train.report_to=[wandb]", "output_dir=p"]
    recipe = load_recipe(path, overrides)
    config = recipe.method_config()
    assert (recipe.train.epochs, recipe.train.seed, recipe.output_dir) == (1.0, 1, Path("p"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert (recipe.model.name, recipe.model.dtype, recipe.train.report_to) == ("m", "float32", ["wandb"])
    assert load_recipe(path, {"method.rank": 8, "model": "n"}).model.name == "n"
    recipe = load_recipe(path, {"method.rank_pattern.layers.0.q_proj": 4})
    assert recipe.method_config().rank_pattern == {"layers.0.q_proj": 4}, "a key may contain dots"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set got 'train.epochs'"),
        ("=3", "--set got '=3'"),
        ("train.epochs=[", "--set train.epochs, line 1"),
        ("train.epochss=1", "train.epochss: no such field; did you mean 'epochs'?"),
        ("trian.epochs=1", "trian: no such field; did you mean 'train'?"),
        ("output_dir.x=1", "--set output_dir.x: 'output_dir' is 'runs/x'"),
        ("method=loraa", "method.name: there is no method 'loraa'; did you mean 'lora'?"),
        ("rank=3", "rank: no such field; did you mean 'method.rank'?"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(RecipeError) as e:
        load_recipe(None, [*(f"{k}={v}" for k, v in MINIMAL.items()), override])
    assert message in str(e.value)


def test_the_given_tree_is_not_changed():
    tree = {**MINIMAL, "method": {"rank": 3}}
    Recipe.from_dict(tree)
    assert tree == {**MINIMAL, "method": {"rank": 3}}


# --- old names


@pytest.mark.parametrize("path", ["out", "model.quant", "data.learn", "train.accumulate", "train.eval_every"])
def test_old_names_are_gone(path):
    section, _, name = path.rpartition(".")
    required = {"model": {"name": "m"}, "data": {"train": "d"}}.get(section, {})
    changes = {section: {**required, name: 7}} if section else {name: 7}
    assert f"\n  {path}: " in error_text(**changes)
    assert path not in {s.path for s in list_settings(Recipe)}


# --- written recipes, documentation


@given(
    rank=st.integers(1, 512),
    rate=st.floats(1e-12, 10, allow_nan=False),
    fraction=st.floats(0, 0.5),
    name=st.text(min_size=1) | st.sampled_from(["\x85", "a\u2028b", "\u2029 c", "'\"", "5", "null"]),
    steps=st.none() | st.integers(1, 10**9),
)
def test_written_recipe_reads_back_equal(rank, rate, fraction, name, steps):
    data = {"train": "t", "validation_fraction": fraction}
    train = {"learning_rate": rate, "max_steps": steps}
    recipe = make_recipe(model=name, data=data, method={"rank": rank}, train=train)
    assert Recipe.from_dict(parse_yaml(recipe.to_yaml(), "r.yaml")) == recipe


def test_demo_recipe():
    recipe = load_recipe(ROOT / "examples/devils-dictionary.yaml")
    assert recipe.data.train == ROOT / "examples/devils-dictionary/train.jsonl"
    assert (recipe.method_config().r, recipe.method_config().lora_alpha) == (16, 32)
    assert not os.path.isabs(recipe.output_dir)


def test_reference_in_the_docs_is_current():
    update_page = runpy.run_path(str(ROOT / "docs/internals/make_reference.py"))["update_page"]
    page = (ROOT / "docs/recipe.md").read_text()
    assert update_page(page) == page, "run python docs/internals/make_reference.py"


def test_faults_are_named_before_torch_is_imported():
    tree = {"model": "m", "data": "d.jsonl", "output_dir": "o", "method": {"rank": 0, "rnak": 1}, "task": "sftt"}
    code = f"""
import sys
from slimtune.core.config import Recipe
try:
    Recipe.from_dict({tree})
except Exception as e:
    print("3 problems" in str(e), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True False", done.stdout + done.stderr


def test_a_wrong_setting_is_answered_without_torch(tmp_path):
    code = """
import sys
from slimtune.cli import main
try:
    main()
except SystemExit as e:
    print(e.code, "torch" in sys.modules)
"""
    flags = ["train", "--model", "smollm2-135m", "--data", tmp_path / "no.jsonl", "--out", tmp_path / "run",
             "--set", "method.rnak=3", "--set", "task.beta=1", "--batch-size", "0"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False", done.stdout + done.stderr
    for line in ("4 problems", "method.rnak: no such field", "task.beta: no such field", "train.batch_size: got 0",
                 "data.train: there is no file"):  # fmt: skip
        assert line in done.stderr


def test_task_is_checked_as_a_section():
    recipe = make_recipe(task="sft")
    assert (recipe.task.name, recipe.objective().name) == ("sft", "sft")
    assert re.search(r"\btask\.name: .*'sftt'.*'sft'", error_text(task="sftt"))
    assert "task.beta: " in error_text(task={"beta": 1})
