"""SmolLM2 on The Devil's Dictionary: what was learned is said to be better; style alone, and a ruin, are not.

`SLIMTUNE_PROVE=FOLDER` keeps the three runs in FOLDER, and takes those that lie there already.
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


def slimtune(*arguments: object) -> tuple[int, dict]:
    command = [sys.executable, "-m", "slimtune", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_folder) -> Path:
    return Path(os.environ.get("SLIMTUNE_PROVE") or tmp_path_factory.mktemp("prove"))


def shuffled(file: Path, out: Path) -> Path:
    """Write the rows of a file, their answers given to each other by chance."""
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    answers = [row[-1] for row in rows]
    random.Random(1).shuffle(answers)
    lines = (json.dumps({"messages": [*row[:-1], answer]}) + "\n" for row, answer in zip(rows, answers, strict=True))
    out.write_text("".join(lines))
    return out


def trained(folder: Path, name: str, *flags: object) -> Path:
    run = folder / name
    if not (run / "result.json").is_file():
        whole = ("--set", "data.validation=null", "--set", "data.validation_fraction=0")
        code, said = slimtune("train", ROOT / "examples" / "devils-dictionary.yaml", "--out", run, *whole, *flags)
        assert code == 0, said
    return run


def test_forty_demo_steps_pass(folder):
    code, found = slimtune("eval", trained(folder, "proper", "--max-steps", 40))
    print(
        {
            k: found[k]
            for k in (
                "loss_reduction",
                "loss_reduction_ci95",
                "accuracy_gain",
                "prompt_dependence",
                "forgetting",
                "verdict",
            )
        }
    )
    assert code == 0
    assert found["verdict"]["passed"]
    assert found["loss_reduction_ci95"][0] > 0.5
    assert found["accuracy_gain_ci95"][0] > 0.03
    assert found["prompt_dependence"]["change_ci95"][0] > -0.1 * found["prompt_dependence"]["base"]
    assert found["forgetting"]["change_ci95"][1] < 0.1


def test_shuffled_answers_do_not_pass(folder):
    rows = shuffled(ROWS / "train.jsonl", folder / "shuffled-train.jsonl")
    run = trained(folder, "style", "--data", rows, "--max-steps", 40, "--batch-size", 4, "--lr", "1e-3")
    right, own = ROWS / "test.jsonl", shuffled(ROWS / "test.jsonl", folder / "shuffled-test.jsonl")
    for file, why in ((right, "past the prompt"), (own, "a prompt is not shown to tell")):
        code, found = slimtune("eval", run, "--data", file, "--general-text", "none")
        print({k: found[k] for k in ("loss_reduction", "loss_reduction_ci95", "prompt_dependence", "verdict")})
        assert code == 1
        assert found["loss_reduction_ci95"][0] > 0.4  # the loss alone would say yes
        (reason,) = found["verdict"]["reasons"]
        assert why in reason


def test_a_ruinous_learning_rate_overdraws_the_budget(folder):
    run = trained(folder, "ruin", "--max-steps", 6, "--batch-size", 2, "--lr", "0.05")
    code, found = slimtune("eval", run)
    print({k: found[k] for k in ("loss_reduction", "loss_reduction_ci95", "forgetting", "verdict")})
    assert code == 1
    assert not found["forgetting"]["within"]
    assert found["forgetting"]["change_ci95"][0] > 1
    assert any("forgot more than its budget" in reason for reason in found["verdict"]["reasons"])
