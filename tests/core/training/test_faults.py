"""Killed, stopped or refused by the disk at any moment, and resumed, a run ends with the adapter it would have had.

`make faults` runs these.
"""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
import yaml
from row_files import write_jsonl
from tiny_run import distance, metrics

from slimtune.core.foundation import files
from slimtune.core.training import checkpoint

pytestmark = pytest.mark.faults

# 24 rows, 3 a step, 5 epochs: 40 steps, a checkpoint each 3.
STEPS = 40
KILLS = 102
SUMS = [*itertools.product(range(1, 7), repeat=2)]
METHODS = {
    "lora": {"name": "lora", "r": 4, "lora_dropout": 0.1},
    "adalora": {"name": "adalora"},
    "prefix_tuning": {"name": "prefix_tuning", "num_virtual_tokens": 4},
}


class Desk:
    """Runs of one recipe: `finish` and `start` take what a user would add to the command."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.recipe, self.folder, self.whole = folder / "recipe.yaml", folder, folder / "whole"
        self.recipe.write_text(yaml.safe_dump(settings))
        code, log = self.finish(self.whole)
        assert code == 0, log

    def finish(self, out: Path, *more: str, **faults) -> tuple[int, str]:
        return forked.finish(str(self.recipe), "--out", str(out), *more, log=self.log_of(out), **faults)

    def start(self, out: Path, *more: str, **faults):
        return forked.start(str(self.recipe), "--out", str(out), *more, log=self.log_of(out), **faults)

    def log_of(self, out: Path) -> Path:
        return self.folder / f"{out.name}-{time.monotonic_ns()}.log"

    def assert_resumed(self, out: Path) -> str:
        """Resume a run and compare it with the whole one; return what was printed."""
        code, log = self.finish(out, "--resume")
        assert code == 0, log
        self.assert_whole(out)
        return log

    def assert_whole(self, out: Path) -> None:
        assert distance(out, self.whole) == 0
        for name in ("step", "train_loss", "validation_loss", "reward"):
            assert metrics(out, name) == metrics(self.whole, name)
        assert {p.name for p in out.iterdir()} == {p.name for p in self.whole.iterdir()}
        assert {p.name for p in (out / "checkpoints").iterdir()} == {
            p.name for p in (self.whole / "checkpoints").iterdir()
        }

    def kill_at_random(self, draw: random.Random, kills: int, steps: int, seconds: float) -> str:
        """Kill runs at their start and in their first `steps` steps, resume each to its end; return what happened."""
        runs, done, moments = 0, 0, set()
        while done < kills:
            out, runs = self.folder / f"run-{runs}", runs + 1
            code = -signal.SIGKILL
            while code:
                at = (
                    (0, draw.uniform(0, 1.5))
                    if draw.random() < 0.15
                    else (draw.randint(1, steps), draw.uniform(0, seconds))
                )
                resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
                if not resume and out.exists():
                    shutil.rmtree(out)  # killed before there was anything to resume
                code, log = self.finish(out, *resume, kill=at)
                assert code in (0, -signal.SIGKILL), log
                done += code != 0
                moments |= {*metrics(out, "step")[-1:]} if code and (out / "metrics.jsonl").is_file() else set()
            self.assert_whole(out)
        return f"{done} kills in {runs} runs, bit for bit; last logged steps {sorted(moments)}"


def with_method(settings: dict, method: str) -> dict:
    train = {**settings["train"], "epochs": 5, "batch_size": 3, "save_steps": 3, "eval_steps": 10}
    return {**settings, "train": train, "method": METHODS[method]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, shared_settings):
    return Desk(tmp_path_factory.mktemp("faults"), with_method(shared_settings, "lora"))


def wait_for_step(out: Path, step: int, process) -> None:
    """Wait until so many steps are logged."""
    file, end = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        lines = file.read_text().splitlines() if file.is_file() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended (code {process.exitcode}) before step {step}")


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_random_kills(tmp_path, shared_settings, method):
    """At least 102 kills over the three methods: at their start, in steps and in checkpoints, several in each run."""
    desk = Desk(tmp_path, with_method(shared_settings, method))
    print(method, desk.kill_at_random(random.Random(method), KILLS // len(METHODS), steps=7, seconds=0.08))


def test_random_kills_of_a_run_on_rewards(tmp_path, smollm2_folder):
    """A real base samples sums, is rewarded for right ones, and learns from them."""
    sums = [{"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": a + b} for a, b in SUMS]
    settings = {
        "model": {"name": str(smollm2_folder), "dtype": "float32"},
        "data": {"train": str(write_jsonl(tmp_path / "sums.jsonl", sums))},
        "task": {"name": "grpo", "rewards": ["numeric-match"], "max_completion_length": 12, "num_generations": 4},
        "train": {"max_steps": 6, "batch_size": 2, "save_steps": 2, "forgetting_budget": None},
    }
    print(Desk(tmp_path, settings).kill_at_random(random.Random(0), kills=5, steps=3, seconds=6))


@pytest.mark.parametrize(("name", "n"), [("fsync", 2), ("fsync", 12), ("fsync", 22), ("replace", 4), ("replace", 8)])
def test_killed_while_a_checkpoint_is_written(desk, tmp_path, name, n):
    out = tmp_path / "killed"
    code, log = desk.finish(out, checkpoint_fault=(name, n, 0))
    assert code == -signal.SIGKILL, log
    assert list((out / "checkpoints").glob(".checkpoint-*"))
    desk.assert_resumed(out)
    assert not list((out / "checkpoints").glob(".checkpoint-*"))


def test_killed_twice_and_the_newest_checkpoint_damaged(desk, tmp_path):
    out = tmp_path / "killed"
    assert desk.finish(out, kill=(8, 0))[0] == -signal.SIGKILL
    assert desk.finish(out, "--resume", kill=(9, 0))[0] == -signal.SIGKILL
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"\0" * 10)
    code, log = desk.finish(out, "--resume")
    assert code == 0, log
    assert re.search(rf"{newest.name} .*optimizer\.safetensors", log)
    assert distance(out, desk.whole) == 0


# --- other signals, and a terminal that closes ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("stderr", ["open", "gone"])
def test_stopped_by_a_signal(desk, tmp_path, name, code, stderr):
    out = tmp_path / "stopped"
    process = desk.start(out, slow=0.05, **({"stderr_dies": True} if stderr == "gone" else {}))
    wait_for_step(out, 7, process)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    assert process.exitcode == code
    step = metrics(out, "step")[-1]
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    assert checkpoint.parse_checkpoint_step(newest) == step
    assert checkpoint.describe_checkpoint_damage(newest) == ""
    code, log = desk.finish(out, "--resume")
    assert code == 0
    assert re.search(rf"resum.* step {step}\b", log)
    assert distance(out, desk.whole) == 0


def test_run_goes_on_without_a_terminal(desk, tmp_path):
    out = tmp_path / "alone"
    assert desk.finish(out, stderr_dies=True)[0] == 0
    desk.assert_whole(out)


# --- disks ------------------------------------------------------------------------------------------------------------

REFUSALS = [
    ("replace", errno.EXDEV, "cannot be renamed across file systems"),
    ("replace", errno.ESTALE, "the network file system has lost the file"),
    ("replace", errno.EROFS, "the file system is read-only"),
    ("fsync", errno.EIO, "the disk reports an input/output error"),
    ("fsync", errno.ENOSPC, "the disk is full"),
    ("fsync", errno.EDQUOT, "the disk is full"),
]


@pytest.mark.parametrize(("name", "number", "words"), REFUSALS, ids=lambda v: errno.errorcode.get(v, "") if v else "")
def test_disk_refuses_a_checkpoint(desk, tmp_path, name, number, words):
    out = tmp_path / "refused"
    code, log = desk.finish(out, checkpoint_fault=(name, 8 if name == "replace" else 20, number))
    assert code == 1, log
    assert words in log
    assert "--resume" in log
    assert "Traceback" not in log
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    desk.assert_resumed(out)


def test_file_size_limit(desk, tmp_path):
    out = tmp_path / "limited"
    code, log = desk.finish(out, file_limit=9000)
    assert code == 1, log
    assert files.DISK_ERRORS[errno.EFBIG][0] in log
    assert "Traceback" not in log
    assert list((out / "checkpoints").iterdir()) == []
    desk.assert_resumed(out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory, of 300 KB: three checkpoints of the tiny run do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(desk, small_disk):
    out = small_disk / "run"
    code, log = desk.finish(out)
    assert code == 1, log
    assert "disk-full" in log
    assert "Traceback" not in log
    assert all(not checkpoint.describe_checkpoint_damage(c) for c in checkpoint.list_checkpoints(out / "checkpoints"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    desk.assert_resumed(out)


def test_read_only_disk(desk, small_disk):
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    out = small_disk / "run"
    assert desk.finish(out, kill=(8, 0))[0] == -signal.SIGKILL
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for run, more in ((out, ["--resume"]), (small_disk / "new", [])):
        code, log = desk.finish(run, *more)
        assert code in (1, 2), log
        assert files.DISK_ERRORS[errno.EROFS][0] in log
        assert "Traceback" not in log
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    desk.assert_resumed(out)


def test_folder_that_cannot_be_written(desk, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    out = Path("/proc/slimtune-run") if os.access(closed, os.W_OK) else closed / "run"  # root may write to any other
    code, log = desk.finish(out)
    assert code in (1, 2), log
    assert "Traceback" not in log
    assert log.count("error: ") == 1
    print(log[log.index("error: ") :])


# --- two writers ------------------------------------------------------------------------------------------------------


def test_resume_of_a_live_run_is_refused(desk, tmp_path):
    out = tmp_path / "live"
    first = desk.start(out, slow=0.1)
    wait_for_step(out, 4, first)
    for _ in range(2):
        code, log = desk.finish(out, "--resume")
        assert code == 2, log
        assert f"process {first.pid} on " in log
    first.join(60)
    assert first.exitcode == 0
    desk.assert_whole(out)


def test_two_new_runs_in_one_folder(desk, tmp_path):
    out = tmp_path / "both"
    processes = [desk.start(out) for _ in range(3)]
    for process in processes:
        process.join(120)
    assert sorted(p.exitcode for p in processes) == [0, 2, 2]
    desk.assert_whole(out)
