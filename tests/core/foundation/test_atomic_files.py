"""Files are written whole or not at all, never onto a device; what a disk refuses is one message; JSON is checked."""

import errno
import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from error_facts import has_code

from slimtune.core.foundation import files
from slimtune.core.foundation.files import (
    atomic_folder,
    convert_os_error,
    parse_json,
    read_json_object,
    to_json,
    write_atomic,
    write_json,
)
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import AdapterError, RunError, SlimtuneError, UsageError
from slimtune.evaluation.output_files import resolve_output_file


def fail(code: int):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, code):
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fail(code))
    with pytest.raises(RunError, check=has_code("disk-full")) as e:
        write_atomic(tmp_path / "a", "n" * 2048)
    assert "2.0 KiB" in str(e.value)
    with pytest.raises(RunError, check=has_code("disk-full")), atomic_folder(tmp_path / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EXDEV])
def test_what_a_disk_refuses_is_named(tmp_path, monkeypatch, call, code):
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, call, fail(code))
    with pytest.raises(RunError, match=f"{tmp_path}/a .*{files.DISK_ERRORS[code][0]}"):
        write_atomic(tmp_path / "a", "new")
    with pytest.raises(RunError, match=f"{tmp_path}/b"), atomic_folder(tmp_path / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "x", "/r/a"), "/r/a: the file system is read-only"),
        (ValueError("I/O error: File too large (os error 27)"), "a file cannot be written: the file is larger"),
        (FileNotFoundError(errno.ENOENT, "x", "/r/a"), "/r/a: there is no such file"),
        (OSError(errno.ENAMETOOLONG, "x", b"/r/\xff"), "/r/\udcff: the name is too long"),
        (RuntimeError("Symlink loop from '/r/a'"), None),
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (OSError("a text alone"), None),
        (KeyError("x"), None),
    ],
)
def test_errors_of_the_system(error, message):
    found = convert_os_error(error)
    assert (found and found.message[: len(message or "")]) == message


def test_a_handled_error_is_not_the_cause():
    bug = KeyError("x")
    bug.__context__ = FileNotFoundError(errno.ENOENT, "x", "/r/a")
    assert convert_os_error(bug) is None
    bug.__context__ = OSError(errno.EIO, "x", "/r/a")
    assert convert_os_error(bug) is not None, "a disk that fails is the cause of whatever follows"


def test_long_names_are_written(tmp_path):
    write_atomic(tmp_path / ("n" * 255), "x")
    with pytest.raises(UsageError, match="name"):
        write_atomic(tmp_path / ("n" * 256), "x")
    with atomic_folder(tmp_path / ("é" * 127)) as folder:
        (folder / "file").touch()


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")
    write_json(path, {"path": path})
    assert read_json_object(path) == {"path": str(path)}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device", "device"])
def test_only_files_are_replaced(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/null") if kind == "device" else path
        if kind != "device":
            path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(UsageError, match=r"is a (folder|device)"):
        resolve_output_file(path)
    with pytest.raises(UsageError, match=rf"{path} .*(folder|device)"):
        write_atomic(path, "x")
    assert path.lstat().st_ino == before.st_ino


def test_links_are_followed_within_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    inside, outside, sub = tmp_path / "inside", tmp_path / "sub/outside", tmp_path / "link"
    inside.symlink_to("target")
    outside.symlink_to(tmp_path / "target")
    assert resolve_output_file(inside) == tmp_path / "target"
    with pytest.raises(UsageError, match=f"outside .*{tmp_path}/target"):
        resolve_output_file(outside)
    sub.symlink_to("sub")
    assert resolve_output_file(sub / "new") == sub / "new", "the folder is the user's choice"
    with pytest.raises(UsageError, match=str(tmp_path / "no")):
        resolve_output_file(tmp_path / "no/x")


def test_metrics_stay_in_the_run_folder(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="folder"):
        RunDir(tmp_path).append_metrics({"step": 1})
    assert not (tmp_path / "elsewhere").exists()


def test_two_writers_of_one_folder(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").touch()
        with pytest.raises(UsageError, match=r"process .*/a\b"), atomic_folder(tmp_path / "a"):
            pass
        with atomic_folder(tmp_path / "a.b"):
            pass
    assert (tmp_path / "a/file").exists()
    with pytest.raises(RunError, match="process"), atomic_folder(tmp_path / "c"):
        shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "a.b", "c", "file", "file"]
    shutil.copytree(tmp_path / "a", tmp_path / ".d.abcdefgh")
    with atomic_folder(tmp_path / "d"):
        pass  # what a killed process left does not count


def test_json_of_scalar_tensors_and_paths(tmp_path):
    text = to_json({"a": torch.tensor(1.5), "b": tmp_path, "c": (1, math.inf), "d": {1: True}})
    assert json.loads(text) == {"a": 1.5, "b": str(tmp_path), "c": [1, None], "d": {"1": True}}
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json_object(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[1]", "list"),
        ("null", "null"),
        ("3", "number"),
        ('{"a": ', "JSON.* column 7"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        (b'{"a": "\xff"}', "UTF-8.* 7"),
    ],
)
def test_odd_json_is_named(tmp_path, text, cause):
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterError, match=rf"x\.json .*{cause}"):
        read_json_object(file, error_class=AdapterError)


def test_a_folder_or_a_pipe_is_no_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, cause in ((tmp_path, "it is a folder"), (tmp_path / "pipe", "it is a device, a pipe")):
        with pytest.raises(SlimtuneError, match=cause):
            read_json_object(path)


def test_parsing_reads_a_byte_order_mark():
    assert parse_json(b'\xef\xbb\xbf{"a": [1]}') == {"a": [1]}


def test_imports_and_writes_without_fcntl_and_resource(tmp_path, monkeypatch):
    """As on Windows; copies of the modules are loaded."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    copies = {}
    for name in ("files", "device"):
        spec = importlib.util.find_spec(f"slimtune.core.foundation.{name}")
        copies[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copies[name])
    with copies["files"].atomic_folder(tmp_path / "a") as folder:
        (folder / "b").touch()
    assert (tmp_path / "a" / "b").is_file()
    assert (copies["files"].fcntl, copies["device"].resource) == (None, None)
