"""A Hub on 127.0.0.1 for the real `huggingface_hub` client: the few endpoints it calls, repositories in memory.

All files are sent inside the commit; the store for large files belongs to the client and is not imitated.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants

TOKEN = "hf_AdaSecretAdaSecretAdaSecret"


@dataclass
class Repo:
    """Branches of a repository: a list of (message, files) each."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1][1]

    def sha(self, branch: str = "main") -> str:
        return hashlib.sha1(repr((branch, len(self.branches[branch]), sorted(self.files(branch)))).encode()).hexdigest()


@dataclass
class Hub:
    """The server's state. `fail` maps a regular expression of "METHOD path" to a status, "hang", "drop" or "echo"."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int | str] = field(default_factory=dict)
    url: str = ""

    def make(self, repo_id: str, private: bool = False, **files: bytes) -> Repo:
        self.repos[repo_id] = Repo(private, {"main": [("initial commit", {".gitattributes": b"", **files})]})
        return self.repos[repo_id]


@contextmanager
def serve_hub(monkeypatch) -> Iterator[Hub]:
    """Serve a Hub where TOKEN may write as "ada", and make the client of this process use it."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": "/nowhere"}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub, stop = Hub(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "stop": stop}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield hub
    stop.set()
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def log_message(self, *_): ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        failure = next((f for pattern, f in self.hub.fail.items() if re.fullmatch(pattern, request)), None)
        if failure in ("hang", "drop"):
            self.close_connection = True
            return self.stop.wait(20) if failure == "hang" else None
        if failure == "echo":
            return self.send(500, json.dumps({"error": f"refused {dict(self.headers)}"}).encode())
        if failure is not None:
            return self.send(failure, {"error": "refused"})
        answer = self.answer(path)
        return self.send(*answer) if isinstance(answer, tuple) else self.send(200, answer)

    do_HEAD = do_POST = do_GET

    def send(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        error = {}
        if status >= 400 and content is not body:
            error = {"X-Error-Message": body["error"], "X-Error-Code": body.get("code", "")}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **error, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def answer(self, path: str) -> dict | tuple:
        """Return the body of an answer, or status, body and headers."""
        hub, login = self.hub, self.headers.get("Authorization")
        given = json.loads(self.body) if self.body and not path.split("/commit/")[1:] else {}
        if login not in (None, f"Bearer {TOKEN}"):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "ada"}
        if path == "/api/validate-yaml":
            values = yaml.safe_load(given["content"].split("---\n")[1]) if "---\n" in given["content"] else {}
            valid = re.fullmatch(r"[\w.-]+/[\w.-]+", values.get("base_model", "a/b"))
            return {"errors": [], "warnings": []} if valid else (400, {"error": "invalid base_model"})
        if path == "/api/repos/create":
            repo_id = f"{given.get('organization') or 'ada'}/{given['name']}"
            if not repo_id.startswith("ada/"):
                return 403, {"error": "no rights"}
            hub.make(repo_id, private=given.get("visibility") == "private")
            return {"url": f"{hub.url}/{repo_id}", "id": repo_id}
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.+))?)?", path)
        repo_id, action, branch, name = found.groups()
        repo = hub.repos.get(repo_id)
        if repo is None or (repo.private and not (login and repo_id.startswith("ada/"))):
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        if self.command == "POST" and not repo_id.startswith("ada/"):
            return 403, {"error": "no rights"}
        if action == "branch":
            repo.branches.setdefault(branch, list(repo.branches["main"]))
            return {}
        branch = branch if branch in repo.branches else "main"
        files = repo.files(branch)
        if action == "resolve":
            headers = {"X-Repo-Commit": repo.sha(), "ETag": f'"{hashlib.sha256(files.get(name, b"")).hexdigest()}"'}
            missing = {"error": "Entry not found", "code": "EntryNotFound"}
            return (200, files[name], headers) if name in files else (404, missing, headers)
        if action == "preupload":
            oids = {n: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for n, c in files.items()}
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                               "oid": oids.get(f["path"])} for f in given["files"]]}  # fmt: skip
        if action == "commit":
            header, *items = (json.loads(line)["value"] for line in self.body.splitlines())
            added = {v["path"]: base64.b64decode(v["content"]) for v in items}
            repo.branches[branch].append((header["summary"], files | added))
            return {"success": True, "commitOid": repo.sha(branch), "commitUrl": f"{hub.url}/{repo_id}/commit/x"}
        if action not in (None, "revision"):
            return 404, {"error": f"no {action}", "code": "EntryNotFound"}
        card = files.get("README.md", b"").decode().split("---\n")
        data = yaml.safe_load(card[1]) if len(card) > 2 else None
        listed = [{"rfilename": n} for n in sorted(files)]
        info = {"id": repo_id, "sha": repo.sha(branch), "private": repo.private, "siblings": listed, "tags": []}
        return info | ({"cardData": data} if data else {})
