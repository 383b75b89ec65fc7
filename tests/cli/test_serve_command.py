"""`slimtune serve` as a process: what it prints, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from hand_run import make_run


@pytest.fixture
def run(tmp_path, tiny_folder):
    return make_run(tmp_path / "sailor", tiny_folder)


def start(*arguments):
    command = [sys.executable, "-m", "slimtune", "serve", *map(str, arguments), "--port", "0"]
    env = {**os.environ, "COLUMNS": "80"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ask(address, **settings):
    body = json.dumps({"model": "sailor", "prompt": "x", "temperature": 0, **settings}).encode()
    request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_ends_with_0(run, number):
    process = start(run)
    address = process.stdout.readline().split()[-1]
    stream = ask(address, max_tokens=20, stream=True)
    stream.readline()
    process.send_signal(number)
    events = stream.read().decode()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert events.rstrip().endswith("data: [DONE]")
    assert re.findall(r"\d+", output.splitlines()[-1]) == ["1", "20"]


def test_wrong_use_is_one_message(slimtune, run, tiny_folder, tmp_path):
    (tmp_path / "more").mkdir()
    other = make_run(tmp_path / "more" / "sailor", tiny_folder, model={"dtype": "float64"})
    for words, message in (
        ((tmp_path / "nowhere",), "there is no run folder"),
        ((run, other), "would both be the model 'sailor'"),
        ((run, f"second={other}"), "need different models: the dtype of one is torch.float64"),
        ((f"tiny-base={run}",), "has the name of its base, 'tiny-base'"),
        ((run, "--host", "0.0.0.0"), "lets other machines use the server, and there is no API key"),
    ):
        done = slimtune("serve", *words)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split()), done.stderr


def test_a_host_without_an_address_is_named(slimtune, run, monkeypatch):
    def find_none(*_, **__):  # some networks answer any name
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find_none)
    done = slimtune("serve", run, "--host", "no.such.host.example", "--api-key", "k")
    assert done.exit_code == 2
    assert "'no.such.host.example'" in done.stderr
