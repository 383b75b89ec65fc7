"""The process of one run, however it ends. Small scripts stand in for runs."""

import signal
import subprocess
import sys
import time

import pytest

from slimtune.experiments import run_worker as worker
from slimtune.experiments.run_worker import train_recipes_at_once_in_subprocess


@pytest.fixture
def launch_script(monkeypatch, tmp_path):
    """Launch a worker whose process runs this code instead."""

    def launch(code: str, names: str = "r", **settings):
        monkeypatch.setattr(worker, "WORKER_COMMAND", (sys.executable, "-c", code))
        return train_recipes_at_once_in_subprocess([tmp_path / f"{name}.yaml" for name in names], **settings)

    return launch


def test_flags_and_log(launch_script, tmp_path):
    result = launch_script(
        "import sys; print(sys.argv[1:], file=sys.stderr)", skip_test_evaluation=True, allow_faulty_rows=True
    )
    assert result[:2] == ("", False)
    assert (tmp_path / "r.log").read_text().strip() == str([str(tmp_path / "r.yaml"), "--trial", "--force"])


def test_error_is_one_line(launch_script):
    code = """print('{"message": "nothing\\\\nhere", "expected": "some", "hint": ""}'); raise SystemExit(1)"""
    assert launch_script(code).error == "nothing here; expected: some"


def test_errors_of_runs_at_once_are_apart(launch_script):
    code = """print('{"message": "nothing", "expected": "", "hint": "", "recipe": "b.yaml"}'); raise SystemExit(1)"""
    result = launch_script(code, "ab")
    assert (result.error, result.errors_by_recipe_file) == ("", {"b.yaml": "nothing"})
    assert launch_script("raise SystemExit(3)", "ab").error.startswith("its process ended with")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by signal 9"),
        ("raise SystemExit(3)", "its process ended with code 3"),
    ],
)
def test_death_is_named(launch_script, code, error):
    assert launch_script(code).error.startswith(error)


def test_should_stop_ends_the_process(launch_script):
    start = time.monotonic()
    assert launch_script(
        "import time; time.sleep(60)", should_stop=lambda: time.monotonic() - start > 0.5
    ).stopped_by_should_stop
    assert time.monotonic() - start < 30


def test_interrupt_waits_for_the_checkpoint(launch_script, tmp_path):
    code = f"""
import pathlib, time
try:
    pathlib.Path({str(tmp_path / "up")!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "checkpoint")!r}).touch()
    raise SystemExit(130)
"""

    def interrupt_once_started() -> bool:
        if (tmp_path / "up").exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        launch_script(code, should_stop=interrupt_once_started)
    assert (tmp_path / "checkpoint").exists()


def test_interrupt_reaches_a_worker_whose_parent_blocks_it():
    code = """
import time
from slimtune.experiments import run_worker as worker
worker.train_and_test_recipes_returning_errors = lambda *_, **__: print("up", flush=True) or time.sleep(60)
worker.main()
"""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_worker_ends_with_its_parent():
    code = "from slimtune.experiments.run_worker import _exit_with_parent as wait; wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1
