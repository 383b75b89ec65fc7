"""A page over a folder of its own, asked by Starlette's test client; it starts a script in place of slimtune."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from slimtune.extras.column_preview import read_column_preview
from slimtune.ui.command_jobs import StartedCommand
from slimtune.ui.pages import UiPages
from slimtune.ui.request_security import RequestGuard
from slimtune.ui.web_app import build_web_app
from slimtune.ui.workspace import WorkspaceFolder

TOKEN = "a-token-of-the-tests"
ORIGIN = "http://127.0.0.1:7860"
SCRIPT = """
import json, sys, time
answer = json.load(open("../answer.json"))
print("working", file=sys.stderr, flush=True)
try:
    time.sleep(answer["seconds"])
except KeyboardInterrupt:
    sys.exit(130)
print(answer["stdout"])
sys.exit(answer["code"])
"""
CHAT = """
import json, sys, time
def send(**event): print(json.dumps(event), flush=True)
if "broken" in sys.argv[1]:
    send(error={"message": "no <b>weights</b>"}); sys.exit(1)
send(ready="tiny with lora")
for line in sys.stdin:
    request = json.loads(line)
    for model in request.get("models", ()):
        send(model=model, piece=f"<i>{model}</i> says ")
        send(model=model, piece=request["text"])
        if "at length" in request["text"]:
            send(model=model, cut=True)
        try:
            time.sleep(30 if "slowly" in request["text"] else 0)
        except KeyboardInterrupt:
            send(model=model, problem="stopped")
            break
    if "models" in request:
        send(end=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with one file of rows."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., None]:
    """Say what every command prints, and how it ends: `commands({"verdict": "ok"}, code=0)`."""

    def answer(result: Any = None, code: int = 0, seconds: float = 0.0) -> None:
        text = result if isinstance(result, str) else json.dumps(result if result is not None else {})
        (tmp_path / "answer.json").write_text(json.dumps({"stdout": text, "code": code, "seconds": seconds}))

    (tmp_path / "slimtune.py").write_text(SCRIPT)
    answer()
    return answer


@pytest.fixture
def pages(folder: Path, tmp_path: Path, commands: Callable[..., None]) -> Iterator[UiPages]:
    (tmp_path / "chat.py").write_text(CHAT)
    slimtune, chat = ((sys.executable, str(tmp_path / name)) for name in ("slimtune.py", "chat.py"))
    made = UiPages(WorkspaceFolder(folder), slimtune, chat, read_preview=read_column_preview)
    yield made
    for job in made.close():
        job.stop()


@pytest.fixture
def stranger(pages: UiPages) -> TestClient:
    """A browser without the token."""
    guard = RequestGuard(build_web_app(pages), TOKEN, "127.0.0.1", 7860, max_upload=4096)
    return TestClient(guard, base_url=ORIGIN, follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture
def browser(stranger: TestClient) -> TestClient:
    """A browser that was given the address with the token, and that says where its forms come from."""
    assert stranger.get("/", params={"token": TOKEN}).status_code == 303
    stranger.headers["origin"] = ORIGIN
    return stranger


@pytest.fixture
def finish(pages: UiPages) -> Callable[[str], StartedCommand]:
    """Wait until a command of a kind has ended, and return it."""

    def wait(kind: str) -> StartedCommand:
        job = pages.jobs.get(kind)
        assert job is not None
        job.wait(20)
        assert job.ended
        return job

    return wait
