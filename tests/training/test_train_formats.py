"""Training on each format and kind of file, as a user types it, and what is refused before anything is written."""

import csv
import json

import pytest
from test_bad_input import Desk, nothing_written, refused
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.config import load_recipe
from slimtune.setup import load_datasets, load_tokenizer_from_recipe


@pytest.fixture
def desk(tiny_folder, tmp_path):
    return Desk(tiny_folder, tmp_path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMATS = {
    "instruction": {"instruction": "say it", "input": "twice", "output": "abc abc"},
    "sharegpt": {"conversations": [{"from": "human", "value": "say it"}, {"from": "gpt", "value": "abc"}]},
    "prompt-completion": {"prompt": "say it:", "completion": " abc"},
    "text": {"text": "abc abc abc"},
}


def encoded(desk, **settings):
    flags = {"model": str(desk.base), "output_dir": str(desk.out), "data.validation_fraction": 0}
    recipe = load_recipe(None, {**flags, **{f"data.{k}": v for k, v in settings.items()}})
    return load_datasets(recipe, load_tokenizer_from_recipe(recipe))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_each_format(desk, name):
    rows = encoded(desk, train=desk.write("rows.jsonl", lines(*[FORMATS[name]] * 3)))
    assert (rows.train_report.kept, rows.train_report.missing_eos) == (3, 0)
    assert [e["line"] for e in rows.train] == [1, 2, 3]
    assert 0 < rows.train_report.supervised_tokens < rows.train_report.tokens


def test_a_table_with_columns_of_other_names(desk):
    with open(desk.folder / "rows.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerows([["id", "question", "answer"], *([i, f"say {i}", "abc\n" * (1 + i % 3)] for i in range(8))])
    data = str(desk.folder / "rows.csv")
    refused(desk.train(data=data), 1, "no known format: its rows have 'id', 'question', 'answer'", "--column")
    nothing_written(desk)
    maps = ("--column", "instruction=question", "--column", "output=answer")
    assert desk.train(*maps, data=data).exit_code == 0
    recipe = load_recipe(desk.out / "recipe.yaml")
    assert recipe.data.columns == {"instruction": "question", "output": "answer"}
    # The run's own recipe says it again: its rows set aside are found, and so is the file.
    assert desk.run("eval", str(desk.out), "--split", "validation").exit_code in (0, 2)
    assert desk.run("eval", str(desk.out), "--data", data).exit_code in (0, 1)  # measured; better or not
    other = str(desk.folder / "b")
    refused(desk.train("--column", "output", data=data, out=other), 2, "--column got 'output'", "role=column")
    refused(desk.train("--column", "output=anser", data=data, out=str(desk.folder / "b")), 2, "did you mean 'answer'?")


def test_the_last_turn_alone(desk):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}] * 3
    data = desk.write("rows.jsonl", lines(*[{"messages": turns}] * 4))

    def supervised_tokens(train_on):
        return encoded(desk, train=data, train_on=train_on).train_report.supervised_tokens

    assert supervised_tokens("assistant") == 3 * supervised_tokens("last_assistant") > 0
    refused(desk.train("--train-on", "last_asistant", data=data), 2, "train_on: got 'last_asistant'")


def test_training_on_a_folder_of_texts(desk):
    (desk.folder / "rows").mkdir()
    for name in "ab":
        desk.write(f"rows/{name}.txt", "abc abc\n\nabcd\n\nabc abc abc\n\nab")
    data = str(desk.folder / "rows")
    trained = desk.train("--train-on", "last_assistant", data=data)
    assert trained.exit_code == 0, trained.stderr
    assert "8 of 8 rows" in trained.stderr
    assert load_recipe(desk.out / "recipe.yaml").data.train_on == "last_assistant"
    measured = desk.run("eval", str(desk.out), "--data", data, "--json")
    assert measured.exit_code == 0, measured.stderr
    assert json.loads(measured.stdout)["rows"] == 8


REFUSED = {
    "preference": (lines({"prompt": "a", "chosen": "b", "rejected": "c"}), 1, "contains preference pairs"),
    "two formats": (lines({"text": "a", "prompt": "b", "completion": "c"}), 1, "may be prompt-completion or text"),
    "half a row": (lines(FORMATS["text"], {"txt": "a"}), 1, "rows.jsonl:2: has no 'text'; did you mean 'txt'?"),
    "a weight between": (lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",
        "weight": 0.3}]}), 1, "rows.jsonl:1: messages[1].weight is 0.3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_is_written(desk, name):
    text, code, part = REFUSED[name]
    refused(desk.train(data=desk.write("rows.jsonl", text)), code, part)
    nothing_written(desk)


def test_a_dataset_that_cannot_be_had(desk, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused(desk.train(data="nobody/nothing-here"), 2, "there is no file 'nobody/nothing-here'", "the connection")
    nothing_written(desk)
    recipe = CliRunner().invoke(app, ["train", "--model", str(desk.base), "--data", "rws.jsonl", "--out", "o"])
    refused(recipe, 2, "there is no file")
