"""The lock for file systems without locks: one owner, a heartbeat, and a takeover when it stops."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from filelock import Timeout

from slimtune.extras import heartbeat_lock
from slimtune.extras.heartbeat_lock import HeartbeatLock

HOLD = """
import sys, time
from pathlib import Path
from slimtune.extras import heartbeat_lock
heartbeat_lock.BEAT_SECONDS = 0.05
if len(sys.argv) > 2:
    heartbeat_lock._identify_process_table = lambda: "another machine"
heartbeat_lock.HeartbeatLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast_beats(monkeypatch):
    monkeypatch.setattr(heartbeat_lock, "BEAT_SECONDS", 0.1)


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".writer.json"


@pytest.fixture
def hold(file):
    """Start a process that holds the lock; with an argument it looks like one of another machine."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-c", HOLD, file, *arguments], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_lock_is_taken_and_given_back(file):
    lock = HeartbeatLock(file)
    lock.acquire()
    assert (lock.is_locked, json.loads(file.read_text())["process"]) == (True, os.getpid())
    lock.release()
    assert (lock.is_locked, file.exists()) == (False, False)


@pytest.mark.parametrize("machine", [(), ("elsewhere",)])
def test_second_process_is_refused_while_the_first_lives(file, hold, machine):
    hold(*machine)
    with pytest.raises(Timeout):
        HeartbeatLock(file).acquire()


@pytest.mark.parametrize("machine", [(), ("elsewhere",)])
def test_lock_of_a_killed_process_is_taken_over(file, hold, machine):
    process = hold(*machine)
    process.kill()
    process.wait()
    started = time.monotonic()
    lock = HeartbeatLock(file)
    lock.acquire()
    waited = time.monotonic() - started
    assert lock.is_locked
    assert waited >= 0.6 if machine else waited < 0.6
    lock.release()


def test_owner_that_stood_still_loses_the_lock(file):
    first, second = HeartbeatLock(file), HeartbeatLock(file)
    first._owner["machine"] = "another machine"
    first.acquire()
    first._released.set()  # as a process that is suspended
    second.acquire()
    first._released.clear()
    first._keep_beating()
    assert (first.is_locked, first.is_lost, second.is_locked) == (False, True, True)
    first.release()
    assert json.loads(file.read_text())["token"] == second._token
    second.release()


def test_faster_process_keeps_the_lock(file, monkeypatch):
    """Two processes see the same stale file, and the slower one renames the file that the faster one has created."""
    fast, slow = HeartbeatLock(file), HeartbeatLock(file)
    file.write_text("{}")
    monkeypatch.setattr(slow, "_is_stale", lambda seen: fast.acquire() or True)
    with pytest.raises(Timeout):
        slow.acquire()
    assert json.loads(file.read_text())["token"] == fast._token
    fast.release()


def test_deleted_file_is_created_again(file):
    lock = HeartbeatLock(file)
    lock.acquire()
    file.unlink()
    time.sleep(0.5)
    assert json.loads(file.read_text())["token"] == lock._token
    lock.release()


def test_file_system_that_cannot_write_twice_leaves_no_file(file, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(HeartbeatLock, "_beat", refuse)
    with pytest.raises(OSError, match="supported"):
        HeartbeatLock(file).acquire()
    assert not file.exists()
