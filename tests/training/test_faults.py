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
import yaml
from tiny_run import distance, metrics

from slimtune.training import checkpoint

pytestmark = pytest.mark.faults

# 24 rows, 3 a step, 5 epochs: 40 steps, a checkpoint each 3.
STEPS = 40

KILL_WHILE_WRITING = """
import os, signal
import slimtune.utils.files as files
fsync, fsync_tree, left = os.fsync, files.fsync_tree, [{after}]
def killing(handle):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
def killing_tree(folder):
    os.fsync = killing
    fsync_tree(folder)
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
    time.sleep({seconds})
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


def finish(recipe: Path, out: Path, *more: str) -> dict:
    done = subprocess.run(
        command(SLOWLY.format(seconds=0), recipe, out, "--json", *more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "log": done.stderr.replace("\n", " ")}


def kill_at(recipe: Path, out: Path, step: int, *more: str) -> None:
    """Start a run, and kill it once `step` steps are logged."""
    with subprocess.Popen(
        command(SLOWLY.format(seconds=0.1), recipe, out, *more), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        file, started = out / "metrics.jsonl", time.monotonic()
        while process.poll() is None and time.monotonic() - started < 120:
            lines = file.read_text().splitlines() if file.is_file() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                process.kill()
                return
            time.sleep(0.005)
        process.kill()
    raise AssertionError(f"the run ended (code {process.returncode}) before step {step}")


def test_killed_at_ten_random_moments(recipe_file, tmp_path):
    finish(recipe_file, tmp_path / "whole")
    seed = int(os.environ.get("SLIMTUNE_FAULT_SEED", time.time_ns() % 10_000))
    print(f"seed {seed}")
    for i, step in enumerate(random.Random(seed).sample(range(1, STEPS - 2), 9)):
        out = tmp_path / f"killed-{i}"
        kill_at(recipe_file, out, step)
        assert finish(recipe_file, out, "--resume")["steps"] == STEPS
        assert distance(out, tmp_path / "whole") == 0, f"killed at step {step}"
        steps = metrics(out, "step")
        assert steps == sorted(steps)


@pytest.mark.parametrize("file", [2, 8, 15])
def test_killed_while_a_checkpoint_is_written(recipe_file, tmp_path, file):
    finish(recipe_file, tmp_path / "whole")
    out = tmp_path / "killed"
    # Eleven files a checkpoint: the 2nd and 8th file of the first one, the 4th of the second.
    done = subprocess.run(command(KILL_WHILE_WRITING.format(after=file), recipe_file, out), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert list((out / "checkpoints").glob(".checkpoint-*"))
    assert "was being written when the run stopped; removed" in finish(recipe_file, out, "--resume")["log"]
    assert distance(out, tmp_path / "whole") == 0
    assert not list((out / "checkpoints").glob(".checkpoint-*"))


def test_killed_twice_and_the_newest_checkpoint_damaged(recipe_file, tmp_path):
    finish(recipe_file, tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at(recipe_file, out, 8)
    kill_at(recipe_file, out, 17, "--resume")
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"\0" * 10)
    log = finish(recipe_file, out, "--resume")["log"]
    assert f"{newest.name} is passed over: optimizer.safetensors is damaged" in log
    assert distance(out, tmp_path / "whole") == 0
