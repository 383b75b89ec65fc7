"""Twelve cells over four workers, for real: a worker is killed, then the command; the numbers are those in sequence."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.faults
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # with and without others beside it
METHODS, SEEDS = "lora,ia3,prompt,dora", 3
KEPT = ("method", "rate", "seeds", "trained_tokens", "loss_reduction_by_seed", "loss_reduction_ci95", "tuned_loss")


@pytest.fixture
def command(tree, tmp_path) -> Callable[..., list[str]]:
    """Return the command of a comparison in a folder: `command("c", "local:4")`."""
    tree["train"] |= {"batch_size": 3, "save_steps": 5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    def build(out: str, on: str | None = None) -> list[str]:
        how = ["--methods", METHODS, "--seeds", str(SEEDS), "--tokens", "1200", "--out", str(tmp_path / out), "--json"]
        return [sys.executable, "-m", "slimtune", "compare", str(recipe), *how, *(["--on", on] if on else [])]

    return build


def finish(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failed"] == []
    return {"methods": [{k: m[k] for k in KEPT} for m in result["methods"]], "pairs": result["pairs"]}


def find_workers(folder: Path) -> list[psutil.Process]:
    """Return the processes of cells of a comparison."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "slimtune.experiments.run_worker" in words and any(word.startswith(f"{folder}/") for word in words):
            found.append(process)
    return found


def count_done(folder: Path) -> int:
    return len(list(folder.glob("cells/*/scores-test.json")))


def wait_until(condition: Callable[[], object], head: subprocess.Popen | None = None) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 600
        assert head is None or head.poll() is None
        time.sleep(0.02)


@pytest.mark.timeout(3000)
def test_numbers_are_those_in_sequence(command, tmp_path):
    pytest.importorskip("ray")
    alone = finish(command("alone"))
    # What is killed: with Ray its worker, whose task Ray starts again; here the process of a cell.
    for on, find_victim in (("local:4", lambda worker: worker), ("ray:4", lambda worker: worker.parent())):
        folder = tmp_path / on.partition(":")[0]
        log_file = tmp_path / f"{folder.name}.log"
        with (
            log_file.open("w") as log,
            subprocess.Popen(command(folder.name, on), stdout=subprocess.DEVNULL, stderr=log, env=ONE_THREAD) as head,
        ):
            wait_until(lambda folder=folder: len(find_workers(folder)) >= 2, head)
            victim = find_workers(folder)[0]
            cell = Path(victim.cmdline()[-1]).with_suffix("")
            find_victim(victim).kill()
            wait_until(lambda cell=cell: (cell / "scores-test.json").is_file(), head)
            wait_until(lambda folder=folder: count_done(folder) >= 6, head)
            head.kill()
        words = log_file.read_text()
        assert ": failed:" not in words
        assert ("killed and restarted 1×" if on == "local:4" else "the task will be retried") in words
        wait_until(lambda folder=folder: not find_workers(folder))
        assert 6 <= count_done(folder) < 12
        assert finish(command(folder.name, on)) == alone
