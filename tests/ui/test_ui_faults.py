"""The page over real commands when a run, the page or the disk fails: it says what happened, and the run goes on.

`make faults` runs these.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from waiting import wait_until
from walk import serve_page

from slimtune.ui.pages import UiPages
from slimtune.ui.workspace import WorkspaceFolder

sys.path.append(str(Path(__file__).parents[1]))
from tiny_run import write_rows

pytestmark = pytest.mark.faults
RUN = {"run": "runs/first"}
CHOICES = {
    "model.name": "base", "data.train": "rows.jsonl", "method.name": "lora", "train.max_steps": "20000",
    "train.batch_size": "2", "more": "train.save_steps=20\ntrain.logging_steps=5\nmethod.r=2",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """The working folder, with a tiny base and rows."""
    home = tmp_path / "home"
    tiny_llama().save_pretrained(home / "base")
    tiny_tokenizer().save_pretrained(home / "base")
    write_rows(home / "rows.jsonl", 24)
    (home / ".slimtune-ui.json").write_text(json.dumps(CHOICES))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def pages(folder) -> Iterator[UiPages]:
    """Pages that start slimtune itself."""
    made = UiPages(WorkspaceFolder(folder))
    yield made
    for job in made.close():
        os.killpg(job.process.pid, signal.SIGKILL)
        job.wait(30)


@pytest.fixture
def small_disk(folder) -> Iterator[Path]:
    """A file system of 4 MiB at `runs` of the working folder."""
    place = folder / "runs"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Write a file that leaves no room on a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        size = 1 << 16
        while size:
            try:
                os.write(file.fileno(), bytes(size))
            except OSError:
                size //= 2
    return ballast


def wait_for_checkpoint(run: Path) -> None:
    wait_until(lambda: [*run.glob("checkpoints/*/*.safetensors")], "a checkpoint", 120)


def read_step(run: Path) -> int:
    steps = [json.loads(line).get("step", 0) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(steps, default=0)


def go_on_and_stop(browser, run: Path) -> None:
    """Resume a run until it is further than before, and stop it, as its page offers."""
    before = read_step(run)
    assert browser.post("/train/resume", data=RUN).headers["location"] == "/train#run"
    wait_until(lambda: read_step(run) > before + 20, "a later step", 120)
    assert 'id="stop-run"' in browser.get("/train").text
    browser.post("/train/stop", data=RUN)
    wait_until(lambda: "stopped before its end" in browser.get("/train").text, "the stop", 60)


def test_a_killed_run_is_resumed_from_any_tab(browser, pages, folder):
    browser.post("/train", data=RUN)
    wait_for_checkpoint(folder / "runs/first")
    os.kill(pages.jobs.get("train").process.pid, signal.SIGKILL)
    wait_until(lambda: pages.jobs.get("train").ended)
    for text in (browser.get("/train").text, browser.get("/live/run", params=RUN).text):
        assert "killed" in text
        assert "SIGKILL" in text
        assert 'id="resume-run"' in text
    go_on_and_stop(browser, folder / "runs/first")


def test_a_run_on_a_full_disk_says_so_and_is_resumed(browser, pages, folder, small_disk):
    browser.post("/train", data=RUN)
    wait_for_checkpoint(small_disk / "first")
    ballast = fill(small_disk)
    wait_until(lambda: pages.jobs.get("train").ended, "the end of the run", 120)
    text = browser.get("/train").text
    assert "disk" in text
    assert 'id="resume-run"' in text
    ballast.unlink()
    go_on_and_stop(browser, small_disk / "first")


def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(browser, pages, small_disk):
    pages.choices["train.max_steps"] = "5"
    browser.post("/train", data=RUN)
    wait_until(lambda: pages.jobs.get("train").state == "done", "the end of the run", 120)
    ballast = fill(small_disk)
    form = {**RUN, "target": "merge", "out": "runs/merged"}
    browser.post("/export", data=form)
    wait_until(lambda: pages.jobs.get("export").ended, "the end of the export", 120)
    text = browser.get("/export").text
    assert "disk" in text
    assert {f.name for f in small_disk.iterdir()} == {"first", "ballast"}
    ballast.unlink()
    browser.post("/export", data=form)
    wait_until(lambda: pages.jobs.get("export").ended, "the end of the export", 120)
    assert "written</span>" in browser.get("/export").text


class Tab:
    """A browser's tab at a page that is a process of its own."""

    def __init__(self, url: str) -> None:
        self.origin = f"http://{urlsplit(url).netloc}"
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        self.opener.open(url).read()

    def get(self, path: str) -> str:
        return self.opener.open(self.origin + path).read().decode()

    def post(self, path: str, form: dict) -> None:
        request = urllib.request.Request(self.origin + path, urlencode(form).encode(), {"Origin": self.origin})
        self.opener.open(request).read()


def test_a_run_outlives_a_page_that_is_killed(folder):
    run = folder / "runs/first"
    with serve_page(folder, killed=True) as url:
        Tab(url).post("/train", RUN)
        wait_for_checkpoint(run)
    before = read_step(run)
    wait_until(lambda: read_step(run) > before + 20, "a later step", 120)
    with serve_page(folder) as url:
        tab = Tab(url)
        assert re.search(r'hx-get="/live/run\?run=runs/first"', tab.get("/train?run=runs/first"))
        tab.post("/train/stop", RUN)
        wait_until(lambda: "stopped before its end" in tab.get("/live/run?run=runs/first"), "the stop", 60)
        assert 'id="resume-run"' in tab.get("/train?run=runs/first")


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_the_page_and_its_training_goes_on(folder, signals):
    command = [sys.executable, "-m", "slimtune", "ui", str(folder), "--port", "0"]
    page = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=take_sigint)
    url = next(found[0] for line in page.stderr if (found := re.search(r"http://\S+", line)))
    tab, run = Tab(url), folder / "runs/first"
    tab.post("/train", RUN)
    wait_for_checkpoint(run)
    host, port = urlsplit(url).netloc.split(":")
    upload = f"POST /upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 999\r\n\r\nhalf"
    with socket.create_connection((host, int(port))) as client:  # a request that runs
        client.sendall(upload.encode())
        for _ in range(signals):
            page.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, errors = page.communicate(timeout=60)
    trainer = int(re.search(r"still running: slimtune train .*\(process (\d+)\)", errors)[1])
    try:
        assert page.returncode == 0, errors
        assert "Traceback" not in errors
        before = read_step(run)
        wait_until(lambda: read_step(run) > before + 20, "a later step", 120)
    finally:
        os.killpg(trainer, signal.SIGKILL)


def take_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup a process ignores it
