"""The output of `--json` against its schema, and the page of the schemas."""

import json
import runpy
import shlex
from pathlib import Path

import jsonschema
import pytest

from slimtune.cli import COMMANDS
from slimtune.cli.json_types import JSON_TYPES, make_command_output_schema

ROOT = Path(__file__).parents[2]
COMMAND_LINES = {
    "train": "train --model base --data rows.jsonl --out {new} --max-steps 1 --dtype float32",
    "eval": "eval run --split validation --generate 1 --max-new-tokens 2",
    "report": "report run --out {new}.html",
    "compare": "compare recipe.yaml --methods lora,ia3 --seeds 1 --tokens 600 --out {new}",
    "tune": "tune recipe.yaml --over train.batch_size=2,4 --trials 2 --set train.max_steps=1 --out {new}",
}
"""A command line whose output is checked; `{new}` is a path that does not exist."""
CHECKED_ELSEWHERE = {"predict": "tests/evaluation/test_predict.py"}
SLOW = ("compare", "tune")


def test_pages_are_fresh():
    files = runpy.run_path(str(ROOT / "docs/internals/make_schemas.py"))["make_files"]()
    stale = [file.name for file, text in files.items() if not file.is_file() or file.read_text("utf-8") != text]
    assert stale == [], "run python docs/internals/make_schemas.py"
    assert {f.stem for f in (ROOT / "docs/schemas").glob("*.json")} == set(JSON_TYPES)


def test_every_typed_command_is_checked():
    assert set(JSON_TYPES) <= set(COMMANDS)
    assert set(JSON_TYPES) == {*COMMAND_LINES, *CHECKED_ELSEWHERE}


@pytest.mark.parametrize("command", JSON_TYPES)
def test_every_key_has_a_meaning(command):
    rows = runpy.run_path(str(ROOT / "docs/internals/make_schemas.py"))["list_rows"]
    schema = make_command_output_schema(command)
    for result in schema.get("anyOf", [schema]):
        jsonschema.Draft202012Validator.check_schema(result)
        assert [key for key, _, meaning in rows(result) if not meaning] == []


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in COMMAND_LINES]
)
def test_output_has_its_schema(command, home, slimtune, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    words = shlex.split(COMMAND_LINES[command].format(new=tmp_path / "new"))
    done = slimtune(*words, "--json")
    assert done.exit_code in (0, 1), done.output
    jsonschema.validate(json.loads(done.stdout), make_command_output_schema(command))
