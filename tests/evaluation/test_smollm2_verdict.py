"""SmolLM2 on The Devil's Dictionary: forty steps are better; style alone, and a ruined model, are not.

`SLIMTUNE_PROVE=FOLDER` keeps the three runs in FOLDER, and takes those that exist there.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.real]
ROOT = Path(__file__).parents[2]
ROWS = ROOT / "examples" / "devils-dictionary"
SHOWN = ("loss_reduction", "loss_reduction_ci95", "accuracy_gain", "prompt_dependence", "forgetting", "verdict")


def slimtune(*arguments):
    command = [sys.executable, "-m", "slimtune", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    print({k: result[k] for k in SHOWN if k in result})
    return done.returncode, result


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_folder):
    return Path(os.environ.get("SLIMTUNE_PROVE") or tmp_path_factory.mktemp("prove"))


def shuffle_answers(file, out):
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    answers = [row[-1] for row in rows]
    random.Random(1).shuffle(answers)
    lines = (json.dumps({"messages": [*row[:-1], answer]}) + "\n" for row, answer in zip(rows, answers, strict=True))
    out.write_text("".join(lines))
    return out


def train(folder, name, *flags):
    run = folder / name
    if not (run / "result.json").is_file():
        all_rows = ("--set", "data.validation=null", "--set", "data.validation_fraction=0")
        code, result = slimtune("train", f"{ROWS}.yaml", "--out", run, *all_rows, *flags)
        assert code == 0, result
    return run


def test_forty_steps_pass(folder):
    code, found = slimtune("eval", train(folder, "proper", "--max-steps", 40))
    assert code == 0
    assert found["verdict"]["passed"]
    assert found["loss_reduction_ci95"][0] > 0.5
    assert found["accuracy_gain_ci95"][0] > 0.03
    assert found["prompt_dependence"]["change_ci95"][0] > -0.1 * found["prompt_dependence"]["base"]
    assert found["forgetting"]["change_ci95"][1] < 0.1


def test_shuffled_answers_do_not_pass(folder):
    rows = shuffle_answers(ROWS / "train.jsonl", folder / "shuffled-train.jsonl")
    run = train(folder, "style", "--data", rows, "--max-steps", 40, "--batch-size", 4, "--lr", "1e-3")
    own = shuffle_answers(ROWS / "test.jsonl", folder / "shuffled-test.jsonl")
    for file, reason in (
        (ROWS / "test.jsonl", "depends less on its prompts"),
        (own, "the prompt is not shown to help"),
    ):
        code, found = slimtune("eval", run, "--data", file, "--general-text", "none")
        assert code == 1
        assert found["loss_reduction_ci95"][0] > 0.4  # the loss alone would say yes
        (given,) = found["verdict"]["reasons"]
        assert reason in given


def test_ruined_model_exceeds_the_budget(folder):
    code, found = slimtune("eval", train(folder, "ruin", "--max-steps", 6, "--batch-size", 2, "--lr", "0.05"))
    assert code == 1
    assert not found["forgetting"]["within"]
    assert found["forgetting"]["change_ci95"][0] > 1
    assert any("budget" in reason for reason in found["verdict"]["reasons"])
