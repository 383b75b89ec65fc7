"""Training on each format and kind of file, as a user types it."""

import csv
import json

import pytest
from desk import refused
from row_files import write_jsonl

from slimtune.core.config import load_recipe
from slimtune.core.training.base_model import load_base_tokenizer
from slimtune.core.training.datasets import tokenize_recipe_datasets

pytestmark = pytest.mark.usefixtures("kept_traces")


def load_rows(desk, rows, **settings):
    data = str(write_jsonl(desk.folder / "rows.jsonl", rows))
    flags = {"model": str(desk.base), "output_dir": str(desk.out), "data.validation_fraction": 0, "data.train": data}
    recipe = load_recipe(None, {**flags, **{f"data.{k}": v for k, v in settings.items()}})
    return tokenize_recipe_datasets(recipe, load_base_tokenizer(recipe.model, recipe.data.chat_template))


FORMATS = {
    "instruction": {"instruction": "say it", "input": "twice", "output": "abc abc"},
    "sharegpt": {"conversations": [{"from": "human", "value": "say it"}, {"from": "gpt", "value": "abc"}]},
    "prompt-completion": {"prompt": "say it:", "completion": " abc"},
    "text": {"text": "abc abc abc"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_each_format(desk, name):
    rows = load_rows(desk, [FORMATS[name]] * 3)
    assert (rows.train_stats.kept, rows.train_stats.missing_eos) == (3, 0)
    assert [e["line"] for e in rows.train] == [1, 2, 3]
    assert 0 < rows.train_stats.supervised_tokens < rows.train_stats.tokens


def test_last_turn_alone(desk):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}] * 3}] * 4
    every, last = (load_rows(desk, rows, train_on=turns).train_stats for turns in ("assistant", "last_assistant"))
    assert every.supervised_tokens == 3 * last.supervised_tokens > 0


def test_table_with_other_column_names(desk):
    with open(desk.folder / "rows.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerows([["id", "question", "answer"], *([i, f"say {i}", "abc\n" * (1 + i % 3)] for i in range(8))])
    data = str(desk.folder / "rows.csv")
    refused(desk.train(data=data), 1, "no known format: its rows have 'id', 'question', 'answer'", "--column")
    refused(desk.train("--column", "output", data=data), 2, "--column got 'output'", "role=column")
    refused(desk.train("--column", "output=anser", data=data), 2, "did you mean 'answer'?")
    desk.assert_nothing_written()
    assert desk.train("--column", "instruction=question", "--column", "output=answer", data=data).exit_code == 0
    assert load_recipe(desk.out / "recipe.yaml").data.columns == {"instruction": "question", "output": "answer"}
    # The run's own recipe knows the columns.
    assert desk.run("eval", str(desk.out), "--data", data).exit_code in (0, 1)  # better or not


@pytest.mark.slow
def test_folder_of_texts(desk):
    (desk.folder / "rows").mkdir()
    for name in "ab":
        desk.write(f"rows/{name}.txt", "abc abc\n\nabcd\n\nabc abc abc\n\nab")
    data = str(desk.folder / "rows")
    trained = desk.train("--train-on", "last_assistant", data=data)
    assert trained.exit_code == 0, trained.stderr
    assert "8 of 8 rows" in trained.stderr
    (desk.folder / "held_out").mkdir()
    desk.write("held_out/c.txt", "\n\n".join(f"abc {i}" for i in range(8)))
    measured = desk.run("eval", str(desk.out), "--data", str(desk.folder / "held_out"), "--json")
    assert json.loads(measured.stdout)["rows"] == 8
