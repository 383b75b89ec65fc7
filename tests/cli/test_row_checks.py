"""Wrong rows are answered from their file: no base is loaded, which takes a minute for a GGUF of 262,144 tokens."""

import itertools
import json
import subprocess
import sys

import pytest
from row_files import write_jsonl
from tiny_run import write_rows

from slimtune.cli.row_checks import CHECKED_ROWS, require_valid_first_rows
from slimtune.core.config.recipe import parse_recipe_sections
from slimtune.core.models import loader
from slimtune.errors import DataError

NO_ANSWER = {"messages": [{"role": "user", "content": "hi"}]}
UNKNOWN = {"question": "a", "reply": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.fixture
def job(tmp_path, tiny_folder, monkeypatch):
    """Flags of a job whose base cannot be loaded; the rows are valid."""
    monkeypatch.setattr(loader, "load_config_and_convert_base", lambda *_, **__: pytest.fail("the base was loaded"))
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    return {"--model": tiny_folder, "--data": rows, "--out": tmp_path / "run"}


@pytest.mark.parametrize("flag", ["--data", "--validation"])
@pytest.mark.parametrize("rows", [[NO_ANSWER], ["{"], [UNKNOWN], [PAIR]], ids=["row", "text", "columns", "pair"])
def test_train_answers_wrong_rows_before_the_base(job, flag, rows, tmp_path, slimtune):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", rows)
    done = slimtune("train", *itertools.chain(*{**job, flag: wrong}.items()))
    assert done.exit_code in (1, 2)
    assert "wrong.jsonl" in "".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_wrong_row_is_answered_without_torch(tmp_path, tiny_folder):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [NO_ANSWER])
    flags = ["train", "--model", str(tiny_folder), "--data", str(wrong), "--out", str(tmp_path / "run")]
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom slimtune.cli import app\n"
        f"done = CliRunner().invoke(app, {flags})\nprint(done.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_compare_answers_wrong_rows_before_the_base(job, tmp_path, slimtune):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [NO_ANSWER])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {job['--model']}\ndata: {{train: {wrong}, validation: {job['--data']}}}\n")
    done = slimtune("compare", recipe, "--methods", "lora,ia3", "--out", tmp_path / "trials")
    assert done.exit_code == 1
    assert "wrong.jsonl:1:" in "".join(done.stderr.split())


def test_a_report_of_rows_that_are_all_invalid_needs_no_base(job, tmp_path, slimtune):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [NO_ANSWER, {"messages": "no"}])
    done = slimtune("data", wrong, "--model", job["--model"], "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["invalid_count"], report["model"]) == (1, 2, str(job["--model"]))


def test_a_report_of_columns_that_no_format_has_needs_no_base(job, tmp_path, slimtune):
    done = slimtune("data", write_jsonl(tmp_path / "wrong.jsonl", [UNKNOWN]), "--model", job["--model"])
    assert done.exit_code == 1
    assert "wrong.jsonl" in "".join(done.stderr.split())


def check(path, **more):
    sections = parse_recipe_sections({"model": "x", "data": {"train": str(path)}}, "a test", partial=True)
    require_valid_first_rows(sections["data"], sections["task"].build_objective(), **more)


def test_files_that_are_empty_or_missing_are_left_to_the_run(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    check(tmp_path / "empty.jsonl")
    check(tmp_path / "missing.jsonl")


def test_only_the_first_rows_are_checked(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", CHECKED_ROWS)
    with rows.open("a") as file:
        file.write('{"messages": 1}\n')
    check(rows)
    rows.write_text('{"messages": 1}\n' + rows.read_text())
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        check(rows)
