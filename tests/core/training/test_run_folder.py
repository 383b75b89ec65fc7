"""A run folder has one writer; what others do to it while a run trains, or before it resumes, loses nothing."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from tiny_run import distance, do_at, metrics, recipe_of, train_until

from slimtune.core.config import load_recipe
from slimtune.core.training import checkpoint
from slimtune.core.training.train import TerminatedAfterCheckpoint, train
from slimtune.errors import RunError, UsageError
from slimtune.extras.heartbeat_lock import HeartbeatLock

# --- one writer -------------------------------------------------------------------------------------------------------


def test_second_writer_is_refused_and_told_of_the_first(settings, monkeypatch):
    folder = Path(settings["output_dir"])
    found = []

    def resume():
        with pytest.raises(UsageError) as e:
            train(recipe_of(settings), resume=True)
        found.append(e.value)

    do_at(monkeypatch, 3, resume)
    result = train(recipe_of(settings))
    assert f"process {os.getpid()} on " in found[0].message
    assert str(folder) in found[0].message
    assert found[0].exit_code == 2
    assert result.steps == 8
    assert metrics(folder, "step") == sorted(metrics(folder, "step"))
    assert not (folder / ".writer.json").exists()


def hold(path, locked, end):
    with FileLock(path):
        locked.set()
        end.wait()


def test_lock_ends_with_its_process(settings, monkeypatch):
    folder = train_until(recipe_of(settings), monkeypatch, 3)
    context = multiprocessing.get_context("fork")
    locked, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder / ".lock", locked, end))
    process.start()
    locked.wait(60)
    with pytest.raises(UsageError, match=f"process .*{folder}"):
        train(recipe_of(settings), resume=True)
    process.kill()
    process.join()
    assert train(recipe_of(settings), resume=True).steps == 8


# --- file systems without locks ---------------------------------------------------------------------------------------


def refuse_flock(monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_run_trains_and_resumes_without_flock(settings, whole_run, monkeypatch, name):
    refuse_flock(monkeypatch, getattr(errno, name))
    found = []

    def resume():
        with pytest.raises(UsageError, match=f"process {os.getpid()} on .*{settings['output_dir']}") as e:
            train(recipe_of(settings), resume=True)
        found.append(e.value.exit_code)
        assert any(Path(f.path).name == ".lock" for f in psutil.Process().open_files())  # as the page looks for it

    with monkeypatch.context() as patch:
        do_at(patch, 2, resume)
        folder = train_until(recipe_of(settings), patch, 3, KeyboardInterrupt)
    train(recipe_of(settings), resume=True)
    assert found == [2]
    assert distance(folder, whole_run.run) == 0
    assert not (folder / ".writer.json").exists()


def test_run_whose_lock_another_process_took_over_writes_nothing_more(settings, monkeypatch):
    refuse_flock(monkeypatch, errno.ENOLCK)
    folder = Path(settings["output_dir"])
    do_at(monkeypatch, 3, lambda: [setattr(lock, "is_lost", True) for lock in locks])
    locks = []
    acquire = HeartbeatLock.acquire
    monkeypatch.setattr(HeartbeatLock, "acquire", lambda lock: [acquire(lock), locks.append(lock)])
    with pytest.raises(RunError, match=f"process {os.getpid()} on .*{folder}"):
        train(recipe_of(settings))
    assert not list((folder / "checkpoints").glob("*"))


def test_run_without_any_lock_is_told(settings, monkeypatch, caplog):
    refuse_flock(monkeypatch, errno.ENOLCK)
    folder = Path(settings["output_dir"])

    def refuse(lock):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(HeartbeatLock, "acquire", refuse)
    assert train(recipe_of(settings)).steps == 8
    assert [r.args for r in caplog.records if "locks" in r.msg] == [(folder, os.strerror(errno.EOPNOTSUPP))]


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_damaged_file_system_is_not_one_without_locks(settings, monkeypatch, name):
    refuse_flock(monkeypatch, getattr(errno, name))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        train(recipe_of(settings))


def test_new_run_deletes_what_a_killed_start_left(settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / ".data.json.em7vap35").write_text("{")
    train(recipe_of(settings))
    assert not list(folder.glob(".data.json*"))


# --- from another folder ----------------------------------------------------------------------------------------------


def test_base_folder_is_named_by_its_absolute_path(settings, monkeypatch):
    base = Path(settings["model"]["name"])
    monkeypatch.chdir(base.parent)
    run = Path(train(recipe_of({**settings, "model": {"name": base.name, "dtype": "float32"}})).run)
    assert load_recipe(run / "recipe.yaml").model.name == str(base)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_ends_a_run_with_a_checkpoint(settings, whole_run, monkeypatch, name, code):
    previous = signal.signal(getattr(signal, name), signal.SIG_DFL)  # the tests may run under nohup
    with monkeypatch.context() as patch:
        do_at(patch, 2, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(TerminatedAfterCheckpoint, match=f"step 3 .*{name}") as e:
            train(recipe_of(settings))
    signal.signal(getattr(signal, name), previous)
    folder = Path(settings["output_dir"])
    assert e.value.exit_code == code
    assert "checkpoint-3" in e.value.hint
    assert f"slimtune train {folder}/recipe.yaml --resume" in e.value.hint
    train(recipe_of(settings), resume=True)
    assert distance(folder, whole_run.run) == 0


def test_nohup_is_respected(settings, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        do_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train(recipe_of(settings)).steps == 8
    finally:
        signal.signal(signal.SIGHUP, previous)


# --- files that are damaged before a run resumes ----------------------------------------------------------------------

LINES = {
    "a damaged line": '{"step": 1}\n{"step\n{"step": 3}\n',
    "a list": '{"step": 1}\n[1, 2]\n',
    "a number": "3\n",
    "no UTF-8": b'{"step": "\xff\xfe"}\nx\n',
}


@pytest.mark.parametrize("name", LINES)
def test_damaged_metrics_do_not_stop_a_resume(settings, whole_run, monkeypatch, capfd, name):
    folder = train_until(recipe_of(settings), monkeypatch, 3)
    content = LINES[name]
    (folder / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    train(recipe_of(settings), resume=True)
    assert "damaged-metrics.jsonl" in capfd.readouterr().err
    assert (folder / "damaged-metrics.jsonl").is_file()
    assert metrics(folder, "step")[0] == 5
    assert distance(folder, whole_run.run) == 0


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_file(path):
    shutil.rmtree(path)
    path.write_text("no folder")


def hide_leftovers(folder):
    (folder / "checkpoints" / ".partial-9").write_text("")
    (folder / ".metrics.jsonl.abc").write_text("")
    (folder / ".mine").write_text("")


BEFORE = {
    "metrics folder": (lambda f: replace_by_folder(f / "metrics.jsonl"), "metrics.jsonl: is a folder"),
    "log folder": (lambda f: replace_by_folder(f / "train.log"), "train.log cannot be written (Is a directory)"),
    "checkpoint file": (lambda f: (f / "checkpoints/checkpoint-9").write_text(""), "checkpoint-9 is passed over"),
    "leftovers": (hide_leftovers, "resuming at step 4"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_strange_file_does_not_stop_a_resume(settings, whole_run, monkeypatch, capfd, name):
    folder = train_until(recipe_of(settings), monkeypatch, 3)
    change, words = BEFORE[name]
    change(folder)
    train(recipe_of(settings), resume=True)
    assert words in capfd.readouterr().err.replace("\n", " ")
    assert distance(folder, whole_run.run) == 0
    assert not [p.name for p in folder.rglob(".*") if p.name not in (".lock", ".mine")]
    assert (folder / ".mine").exists() == (name == "leftovers")


# --- files that vanish while a run trains -----------------------------------------------------------------------------

VANISH = {
    "recipe": (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml was deleted while the run trained"),
    "checkpoints": (lambda f: shutil.rmtree(f / "checkpoints"), ""),
    "checkpoints a file": (lambda f: replace_by_file(f / "checkpoints"), "was replaced by a file"),
    "metrics": (lambda f: (f / "metrics.jsonl").unlink(), ""),
    "log a folder": (lambda f: replace_by_folder(f / "train.log"), "train.log cannot be written"),
}


@pytest.mark.parametrize("name", VANISH)
def test_run_survives_what_vanishes(settings, whole_run, monkeypatch, capfd, name):
    folder = Path(settings["output_dir"])
    change, words = VANISH[name]
    do_at(monkeypatch, 6, lambda: change(folder))
    result = train(recipe_of(settings, save_steps=2))
    assert words in capfd.readouterr().err.replace("\n", " ")
    assert distance(folder, whole_run.run) == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == 8
    assert (folder / "recipe.yaml").is_file()
    assert result.best_step == 8


def test_best_checkpoint_vanishes(settings, monkeypatch, capfd):
    losses = iter([4.0, 3.0, 2.0, 3.5, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("slimtune.objectives.sft.SFT.summarize", lambda *_: {"loss": next(losses)})
    folder = Path(settings["output_dir"])
    do_at(monkeypatch, 7, lambda: shutil.rmtree(folder / "checkpoints" / "checkpoint-3"))
    result = train(recipe_of(settings, eval_steps=1, save_total_limit=5, forgetting_budget=None))
    assert (result.best_step, result.validation_loss) == (4, 3.5)
    assert re.search(r"adapter .*step 3, ", capfd.readouterr().err)


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_run_folder_vanishes(settings, whole_run, monkeypatch, tmp_path, how):
    folder = Path(settings["output_dir"])
    with monkeypatch.context() as patch:
        change = shutil.rmtree if how == "deleted" else lambda f: f.rename(tmp_path / "moved")
        do_at(patch, 6, lambda: change(folder))
        with pytest.raises(RunError, match=f"{folder} .*deleted") as e:
            train(recipe_of(settings))
    assert "checkpoint-7" in e.value.hint
    assert [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")] == ["checkpoint-7"]
    train(recipe_of(settings), resume=True)
    assert distance(folder, whole_run.run) == 0


# --- a machine that is busy -------------------------------------------------------------------------------------------


def test_slow_steps_are_explained_once(settings, monkeypatch, capfd):
    monkeypatch.setattr("slimtune.core.training.training_loop.time.thread_time", lambda: 0.0)
    train(recipe_of(settings))
    assert capfd.readouterr().err.count("cores") == 1
