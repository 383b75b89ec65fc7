"""Killed at any moment and resumed, a run ends with the adapter it would have had (`make faults`)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slimtune.training import checkpoint

pytestmark = pytest.mark.faults

# 24 rows, 3 a step, 5 epochs: 40 steps, a checkpoint each 3.
STEPS = 40

KILL_WHILE_WRITING = """
import os, signal
fsync, left = os.fsync, [{after}]
def killing(handle):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
import slimtune.utils.files as files
tree = files.fsync_tree
def killing_tree(folder):
    os.fsync = killing
    tree(folder)
    os.fsync = fsync
files.fsync_tree = killing_tree
from slimtune.cli import main
main()
"""

# Slow enough that a parent can hit any step.
SLOWLY = """
import time
from slimtune.training.loop import TrainingLoop
train_step = TrainingLoop.train_step
def slow(self, rows):
    time.sleep(0.1)
    return train_step(self, rows)
TrainingLoop.train_step = slow
from slimtune.cli import main
main()
"""


@pytest.fixture
def recipe_file(settings, tmp_path):
    settings["train"] |= {"epochs": 5, "batch_size": 3, "save_steps": 3, "eval_steps": 10}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def command(program: str, recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", program, "train", str(recipe), "--out", str(out), *more]


def finished(recipe: Path, out: Path, *more: str) -> dict:
    done = subprocess.run(
        command(SLOWLY.replace("0.1", "0"), recipe, out, "--json", *more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "said": done.stderr}


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def check_same(a: Path, b: Path) -> None:
    left, right = adapter(a), adapter(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def killed_at(recipe: Path, out: Path, step: int, *more: str) -> int:
    """Start a run, kill it once `step` steps are logged; return the last logged step."""
    process = subprocess.Popen(
        command(SLOWLY, recipe, out, *more), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 120:
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        seen = json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0
        if seen >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return seen
        time.sleep(0.005)
    raise AssertionError(f"the run ended (code {process.poll()}) before step {step}")


def test_killed_at_ten_random_moments(recipe_file, tmp_path):
    finished(recipe_file, tmp_path / "whole")
    seed = int(os.environ.get("SLIMTUNE_FAULT_SEED", time.time_ns() % 10_000))
    print(f"seed {seed}")
    draw = random.Random(seed)
    for i, step in enumerate(draw.sample(range(1, STEPS - 2), 9)):
        out = tmp_path / f"killed-{i}"
        seen = killed_at(recipe_file, out, step)
        result = finished(recipe_file, out, "--resume")
        told = [line for line in result["said"].splitlines() if "resuming" in line or "starting" in line]
        print(f"killed after step {seen}: {told}")
        assert result["steps"] == STEPS
        check_same(out, tmp_path / "whole")
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)


@pytest.mark.parametrize("file", [2, 8, 15])
def test_killed_while_a_checkpoint_is_written(recipe_file, tmp_path, file):
    finished(recipe_file, tmp_path / "whole")
    out = tmp_path / "killed"
    # Eleven files a checkpoint: the 2nd and 8th file of the first one, the 4th of the second.
    done = subprocess.run(command(KILL_WHILE_WRITING.format(after=file), recipe_file, out), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert list((out / "checkpoints").glob(".checkpoint-*"))
    result = finished(recipe_file, out, "--resume")
    assert "was being written when the run stopped; removed" in result["said"].replace("\n", " ")
    check_same(out, tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".checkpoint-*"))


def test_killed_twice_and_the_newest_checkpoint_damaged(recipe_file, tmp_path):
    finished(recipe_file, tmp_path / "whole")
    out = tmp_path / "killed"
    killed_at(recipe_file, out, 8)
    killed_at(recipe_file, out, 17, "--resume")
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"\0" * 10)
    result = finished(recipe_file, out, "--resume")
    assert f"{newest.name} is passed over: optimizer.safetensors is damaged" in result["said"].replace("\n", " ")
    check_same(out, tmp_path / "whole")
