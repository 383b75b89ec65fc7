"""Inputs that an earlier release answered wrongly, and what is said now: one line per case, and anyone adds one.

A case writes its files into an empty folder, runs one command there, and names the exit code and words of the output.
In files and commands BASE stands for the folder of a tiny Llama, RUN for a finished run that trained it (a copy of its
own), ROWS for a file of 24 sound chat rows. What needs more than one command is tested beside the code it is about.
"""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_run import write_rows
from typer.testing import CliRunner

from slimtune.cli import app


class Case(NamedTuple):
    name: str
    files: dict[str, str | bytes]
    command: str
    exit_code: int
    words: str


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

CASES: list[Case] = [
    Case("unknown-base", {}, "plan no-such-base", 2, "there is no base 'no-such-base'"),
    # Data: columns, labels, images, contents that are not understood
    #
    #
    # Rows and templates that are hostile: duplicate keys, huge numbers, deep nesting, endless loops
    Case(
        "key-twice",
        {"a.jsonl": CHAT.replace("{", '{"messages": [], ', 1)},
        "data a.jsonl --model BASE",
        1,
        "has the key 'messages' twice in one object: line 1",
    ),
    Case(
        "5000-digits",
        {"a.jsonl": CHAT.replace("{", '{"id": ' + "9" * 5000 + ", ", 1)},
        "data a.jsonl --model BASE",
        1,
        "does not parse as JSON (a huge number)",
    ),
    Case("utf-16", {"a.jsonl": CHAT.encode("utf-16")}, "data a.jsonl --model BASE", 1, "is UTF-16 text"),
    Case("gz", {"a.jsonl.gz": b"x"}, "data a.jsonl.gz --model BASE", 2, "gunzip -k a.jsonl.gz"),
    #
    #
    # Plans: positions, devices, families, names of bases
    #
    #
    # Catalog
    #
    #
    # Adapter files: patterns, ranks, dtypes
    #
    #
    # Method settings
    #
    #
    # Training: non-finite losses, two writers
    Case("diverged", {}, "train --model BASE --data ROWS --out o --lr 1e30 --max-steps 8 --dtype float32", 1, "is NaN"),
    Case("metrics-list", {"run/metrics.jsonl": "[1]\n"}, "train RUN/recipe.yaml --resume", 0, "line 1 is a list"),
    Case("no-sums", {"run/checkpoints/checkpoint-1/checksums.json": "{}"}, "train RUN/recipe.yaml --resume", 1, "name"),
    Case("other-step", {"run/checkpoints/checkpoint-²/x": ""}, "train RUN/recipe.yaml --resume", 0, "done already"),
    #
    # Run folders and reports that are damaged
    #
    #
    # Export, merge and push
    #
    #
    # Evaluation and generation
    #
    #
    # Recipes and flags
    #
    #
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]):
    folder = tmp_path_factory.mktemp("wrong-answers")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", 24)
    settings = f"--model {folder}/base --data {folder}/rows.jsonl --max-steps 1 --dtype float32"
    done = CliRunner().invoke(app, ["train", *settings.split(), "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_wrong_answer(case: Case, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = {"BASE": home / "base", "RUN": tmp_path / "run", "ROWS": home / "rows.jsonl"}

    def fill(text: str) -> str:
        for word, place in places.items():
            text = text.replace(word, str(place))
        return text

    monkeypatch.chdir(tmp_path)
    if "RUN" in case.command:
        shutil.copytree(home / "run", tmp_path / "run")
    for name, content in case.files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else fill(content).encode())
    done = CliRunner().invoke(app, shlex.split(fill(case.command)), env={"COLUMNS": "200"})
    assert done.exit_code == case.exit_code, done.output
    assert case.words in " ".join(done.output.split())
    assert "bug in slimtune" not in done.output
