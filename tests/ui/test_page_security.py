"""The page answers its own user alone, within the working folder, and shows foreign text as text."""

import asyncio
import os

import pytest

from slimtune.errors import UsageError
from slimtune.ui.request_security import HEADERS, MAX_FORM, RequestGuard, is_own_host
from slimtune.ui.web_app import build_web_app
from slimtune.ui.workspace import WorkspaceFolder

TOKEN, ORIGIN = "a-token-of-the-tests", "http://127.0.0.1:7860"
PATHS = ["/", "/plan", "/live/data", "/static/ui.css", "/no-such-page", "/columns", "/check/train.epochs", "/machines",
         "/help"]  # fmt: skip
FORMS = ["/rows", "/upload", "/plan", "/train", "/train/stop", "/evaluate", "/chat/rate", "/chat/learn", "/machines",
         "/machines/bench", "/help", "/export/verify"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_answered_without_the_token(stranger, path):
    for answer in (stranger.get(path), stranger.get(path, params={"token": "wrong"})):
        assert answer.status_code == 403
        assert "slimtune ui" in answer.text
        assert "set-cookie" not in answer.headers


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(stranger):
    answer = stranger.get("/plan", params={"token": "a-token-of-the-tests"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/plan"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert stranger.get("/plan").status_code == 200


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "/%5cevil.example", "///evil.example/?x=1"])
def test_a_redirect_stays_on_this_server(stranger, path):
    mark = "&" if "?" in path else "?"
    answer = stranger.get(f"{ORIGIN}{path}{mark}token=a-token-of-the-tests")
    assert answer.status_code == 303
    assert not answer.headers["location"].lower().startswith(("//", "/\\"))
    assert "token" not in answer.headers["location"]


def test_an_upload_that_is_cut_off_keeps_nothing(pages, folder, caplog):
    parts = [{"type": "http.request", "body": b"--x\r\nContent-Disposition: form-data; name=file; filename=a.csv\r\n",
              "more_body": True}, {"type": "http.disconnect"}]  # fmt: skip
    head = [(b"host", b"127.0.0.1"), (b"origin", b"http://127.0.0.1"), (b"content-length", b"4000"),
            (b"cookie", f"slimtune-ui-7860={TOKEN}".encode()),
            (b"content-type", b"multipart/form-data; boundary=x")]  # fmt: skip
    scope = {"type": "http", "method": "POST", "path": "/upload", "raw_path": b"/upload", "query_string": b"",
             "headers": head, "scheme": "http", "http_version": "1.1", "server": None, "client": None}  # fmt: skip
    sent = []

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    guard = RequestGuard(build_web_app(pages), TOKEN, "127.0.0.1", 7860, max_upload=4096)
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 499
    assert [*folder.glob("uploads/*")] == []


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "8.8.8.8", "", "[::1]evil.example", "[::1]:80evil"]
)
def test_a_foreign_name_is_refused(browser, host):
    assert browser.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:7860"])
def test_this_machine_has_several_names(host):
    assert is_own_host(host, "127.0.0.1")


def test_a_server_for_others_takes_addresses_and_its_own_names():
    assert is_own_host("192.168.1.7:7860", "0.0.0.0")
    assert is_own_host(f"{os.uname().nodename}:7860", "0.0.0.0")
    assert not is_own_host("evil.example:7860", "0.0.0.0")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", ""])
def test_a_form_of_another_site_is_refused(browser, folder, origin):
    form = {"model.name": "smollm2-135m", "data.train": "rows.jsonl"}
    assert browser.post("/rows", data=form, headers={"origin": origin}).status_code == 403
    assert browser.put("/rows").status_code == 405
    assert not (folder / ".slimtune-ui.json").exists()


@pytest.mark.parametrize("path", FORMS)
def test_a_form_without_an_origin_or_a_token_is_refused(browser, stranger, pages, path):
    del browser.headers["origin"]
    assert browser.post(path, data={}).status_code == 403
    stranger.cookies.clear()
    assert stranger.post(path, data={}, headers={"origin": ORIGIN}).status_code == 403
    assert not any(map(pages.jobs.get, ("data", "plan", "train", "bench", "explain", "verify")))


def test_every_answer_forbids_foreign_scripts_and_frames(browser):
    for path in PATHS:
        answer = browser.get(path)
        assert HEADERS.items() <= dict(answer.headers).items(), path
    assert "unsafe-inline" not in HEADERS["content-security-policy"].replace("style-src-attr 'unsafe-inline'", "")


def test_forms_and_files_have_a_largest_size(browser, folder):
    assert browser.post("/plan", data={"more": "x" * MAX_FORM}).status_code == 413
    assert browser.post("/upload", files={"file": ("big.jsonl", b"x" * 5000)}).status_code == 413

    def chunks():  # without a Content-Length
        yield from [b"more=" + b"x" * (MAX_FORM // 2)] * 3

    head = {"content-type": "application/x-www-form-urlencoded"}
    assert browser.post("/plan", content=chunks(), headers=head).status_code == 413
    assert [*folder.glob("uploads/*")] == []


OUTSIDE = ["../secret.jsonl", "/etc/passwd", "link.jsonl", "linked/secret.jsonl", "dir", "~/x.jsonl", "a\0b", "..", ""]


@pytest.mark.parametrize("text", OUTSIDE)
def test_no_path_leaves_the_working_folder(browser, folder, pages, text):
    (folder.parent / "secret.jsonl").write_text('{"text": "secret"}\n')
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "dir").mkdir()
    (folder / "dir/inner.jsonl").symlink_to(folder.parent / "secret.jsonl")
    for form in ({"model.name": "smollm2-135m", "data.train": text}, {"model.name": text, "data.train": "rows.jsonl"}):
        if form["model.name"] == "dir":
            continue
        answer = browser.post("/rows", data=form)
        assert answer.status_code == 400
        assert pages.jobs.get("data") is None


def test_settings_name_no_path_outside_and_trust_no_code(browser, pages, folder):
    browser.post("/rows", data={"model.name": "smollm2-135m", "data.train": "rows.jsonl"})
    pages.jobs.stop_all()
    for line in (
        "data.chat_template=/etc/passwd", "data.validation=../x.jsonl", "model.trust_remote_code=true",
        "output_dir=/tmp/x", "model.name=/tmp/x", "method.anything=/etc/passwd", "data={train: /etc/passwd}", "no",
    ):  # fmt: skip
        assert browser.post("/plan", data={"more": line}).status_code == 400, line
        assert pages.jobs.get("plan") is None


def test_new_folders_are_inside(folder):
    workspace = WorkspaceFolder(folder)
    (folder / "linked").symlink_to(folder.parent)
    assert workspace.resolve_new("runs/first") == folder / "runs/first"
    for text in ("../x", "/x", "linked/x", "-x", "a/../b", "a//b", ""):
        with pytest.raises(UsageError):
            workspace.resolve_new(text)


def test_foreign_text_is_never_markup(browser, folder, pages):
    bad = '<script>alert(1)</script>"onload=x '
    (folder / f"{bad.replace('/', '')}.jsonl").write_text("{}")
    answer = browser.post("/rows", data={"model.name": bad, "data.train": bad})
    assert answer.status_code == 400
    for text in (answer.text, browser.get("/").text, browser.get("/plan").text, browser.get(f"/live/{bad}").text):
        assert "<script>alert" not in text
        assert '"onload' not in text
