"""`slimtune data`: what it prints, its exit codes, its page; and training that asks it first."""

import json

import pytest
from typer.testing import CliRunner

from slimtune.cli import app


def slimtune(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def talk(i, answer=None):
    said = answer or f"The word number {i} means {'very ' * (i % 4)}{i * 37}."
    return {"messages": [{"role": "user", "content": f"Define {i}."}, {"role": "assistant", "content": said}]}


@pytest.fixture
def rows(tmp_path):
    def write(*changed, n=20, name="rows.jsonl"):
        made = [talk(i) for i in range(n)]
        for line, row in changed:
            made[line - 1] = row
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made), encoding="utf-8")
        return path

    return write


def test_a_sound_file(rows, tiny_folder):
    done = slimtune("data", rows(), "--model", tiny_folder)
    assert done.exit_code == 0, done.stderr
    assert "20, none invalid" in done.stdout
    assert "<|im_start|>user\nDefine 0.<|im_end|>" in done.stdout
    assert done.stdout.rstrip().endswith("ok")


def test_json_is_one_object_and_the_exit_code_is_the_verdict(rows, tiny_folder):
    path = rows((7, talk(3)))
    done = slimtune("data", path, "--model", tiny_folder, "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["verdict"]) == (0, "warnings")
    assert [(f["code"], f["lines"]) for f in report["issues"]] == [("duplicate", [7])]
    assert slimtune("data", path, "--model", tiny_folder, "--strict", "--json").exit_code == 1
    faulty = slimtune("data", rows((2, talk(2, "So<|im_end|>"))), "--model", tiny_folder, "--json")
    assert (faulty.exit_code, json.loads(faulty.stdout)["verdict"]) == (1, "errors")
    shown = slimtune("data", rows((2, talk(2, "So<|im_end|>"))), "--model", tiny_folder)
    assert shown.exit_code == 1
    assert "error: control-token-in-text: " in shown.stdout
    assert "line 2" in shown.stdout


def test_overlap_with_validation_and_the_page(rows, tiny_folder, tmp_path):
    held = rows((3, talk(70)), (4, talk(5)), n=4, name="held.jsonl")
    train = rows((1, talk(90)), (2, talk(91)), (3, talk(92)))
    beside = ("data", train, "--model", tiny_folder, "--validation", held, "--json")
    done = slimtune(*beside, "--html", tmp_path / "a.html")
    report = json.loads(done.stdout)
    assert [(f["code"], f["severity"], f["lines"]) for f in report["issues"]] == [("overlap", "error", [6])]
    assert "line 6 is line 4" in report["issues"][0]["what"]
    assert "line 6 is line 4" in (tmp_path / "a.html").read_text(encoding="utf-8")
    broken = held.read_text(encoding="utf-8") + "{\n"
    held.write_text(broken.replace("number 5 means", "number 5 is"), encoding="utf-8")
    done = slimtune(*beside)
    assert [f["code"] for f in json.loads(done.stdout)["issues"]] == ["validation-invalid"]


def test_another_format_and_names_of_columns(tmp_path, tiny_folder):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"Define {i},It is {i * 31}\n" for i in range(9)), encoding="utf-8")
    maps = ("--column", "instruction=question", "--column", "output=answer")
    report = json.loads(slimtune("data", path, "--model", tiny_folder, *maps, "--json").stdout)
    assert (report["format"], report["rows"], report["verdict"]) == ("instruction", 9, "ok")
    assert slimtune("data", path, "--model", tiny_folder).exit_code == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--max-seq-len", "1"), "data.max_seq_len: got 1"),
        (("--batch-size", "0"), "train.batch_size: got 0"),
        (("--column", "messages"), "--column got 'messages'"),
        (("--on-overlong", "cut"), "cut"),
        (("--validation", "none.jsonl"), "no such file"),
    ],
)
def test_wrong_use(rows, tiny_folder, args, said):
    done = slimtune("data", rows(), "--model", tiny_folder, *args)
    assert done.exit_code == 2
    assert said in done.stderr


def test_training_stops_on_faults_and_goes_on_by_force(rows, tiny_folder, tmp_path):
    path = rows((2, talk(2, "So<|im_end|>")), (9, talk(4)))
    train = ("train", "--model", tiny_folder, "--data", path, "--max-steps", "1", "--batch-size", "4", "--rank", "2",
             "--dtype", "fp32", "--out", tmp_path / "run")  # fmt: skip
    stopped = slimtune(*train)
    assert stopped.exit_code == 1
    assert "line 2" in stopped.stderr
    assert "--force" in stopped.stderr
    assert not (tmp_path / "run").exists()
    done = slimtune(*train, "--force")
    assert done.exit_code == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["validation"] is None
    assert kept["train"]["verdict"] == "errors"
    assert [f["code"] for f in kept["train"]["issues"]] == ["control-token-in-text", "duplicate"]
    assert "error: rows with a control token" in (tmp_path / "run" / "train.log").read_text()
    alone = json.loads(slimtune("data", path, "--model", tiny_folder, "--batch-size", "4", "--json").stdout)
    assert {**alone, "seconds": 0} == {**kept["train"], "seconds": 0, "file": str(path)}


def test_a_sound_run_says_so_in_one_line(rows, tiny_folder, tmp_path):
    held = rows(*((i, talk(50 + i)) for i in range(1, 5)), n=4, name="held.jsonl")
    done = slimtune(
        "train", "--model", tiny_folder, "--data", rows(), "--validation", held, "--max-steps", "1",
        "--batch-size", "4", "--rank", "2", "--dtype", "fp32", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("train data: ok") == log.count("validation data: ok") == 1
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (kept["train"]["rows"], kept["validation"]["rows"]) == (20, 4)
