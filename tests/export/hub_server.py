"""A Hub of our own on 127.0.0.1: the endpoints that the real `huggingface_hub` client calls, in memory.

Large files come by the older Git LFS batch interface, or by Xet's. A repository has branches, a branch commits, a
commit all files. Accounts come by their tokens; each may write under its own name and under those of its organizations.
`fail` makes an endpoint answer otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants
from xet_store import chunks_of


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1].files

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        seen = f"{branch}{len(commits)}{message}{sorted(files)}".encode()
        commits.append(Commit(hashlib.sha1(seen).hexdigest(), message, files))
        return commits[-1]


@dataclass
class Hub:
    """What the server knows, and what it was asked.

    Args:
        accounts: name and organizations by token.
        repos: by id.
        store: large files by their sha256.
        asked: method, path and headers of every request, in order.
        fail: by a regular expression of "METHOD path": a status, "hang" (no answer), "drop" (the line is cut),
            "echo" (500, with the request's headers in the message), "page" (a page that is no JSON).
        large: endings of files that go to the store of large files.
    """

    accounts: dict[str, tuple[str, ...]]
    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    fail: dict[str, int | str] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors", ".gguf")
    url: str = ""
    xorbs: list[bytes] = field(default_factory=list)

    def make(self, repo_id: str, private: bool = False, **files: bytes) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": b"", **files})
        return repo

    def calls(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.asked]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


TOKEN, XET_TOKEN = "hf_AdaSecretAdaSecretAdaSecret", "short-lived"


@contextmanager
def online(monkeypatch: Any) -> Iterator[Hub]:
    """Serve a hub with two accounts, `ada` (TOKEN) and `bob`, and let the client of this process know no other."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the older store of large files, plain HTTP
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    with serving(Hub({TOKEN: ("ada", "engines"), "hf_bob": ("bob",)})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub
    huggingface_hub.close_session()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.url` inside the `with`."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "over": threading.Event()})
    )
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.RequestHandlerClass.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    over: threading.Event
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: Any) -> None: ...

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path, dict(self.headers)))
        fault = next((f for r, f in self.hub.fail.items() if re.fullmatch(r, f"{self.command} {path}")), None)
        try:
            if fault is not None:
                self._fail(fault)
                return
            self._answer(path)
        except Refused as e:
            told = {"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {})}
            self._send(e.status, json.dumps({"error": e.message}).encode(), **told)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _fail(self, fault: int | str) -> None:
        if isinstance(fault, int):
            raise Refused(fault, f"as told, {fault}")
        if fault == "echo":
            self._send(500, json.dumps({"error": f"could not serve {dict(self.headers)}"}).encode())
        elif fault == "page":
            self._send(200, b"<html>a proxy's page</html>", **{"Content-Type": "text/html"})
        elif fault == "hang":
            self.over.wait(20)
            self.close_connection = True
        else:
            self.close_connection = True

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode())

    def _given(self) -> Any:
        return json.loads(self.body)

    def _account(self, needed: bool = True) -> tuple[str, ...]:
        header = self.headers.get("Authorization", "")
        names = self.hub.accounts.get(header.removeprefix("Bearer "))
        if names is None and (header or needed):
            raise Refused(401, "Invalid credentials in Authorization header")
        return names or ()

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        names = self._account(needed=write)
        repo, mine = self.hub.repos.get(repo_id), repo_id.split("/")[0] in names
        if repo is None or (repo.private and not mine):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise Refused(403, "You don't have the required permissions to write here")
        return repo

    def _answer(self, path: str) -> None:
        for pattern, do in _ROUTES:
            if (found := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                getattr(self, do)(*found.groups())
                return
        raise Refused(404, f"no endpoint {self.command} {path}", "EntryNotFound")

    def whoami(self) -> None:
        self._json({"type": "user", "name": self._account()[0]})

    def create(self) -> None:
        given, names = self._given(), self._account()
        owner = given.get("organization") or names[0]
        repo_id = f"{owner}/{given['name']}"
        if owner not in names:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        self.hub.make(repo_id, private=given.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision or "main")
        files = [{"rfilename": n} for n in sorted(commit.files)]
        told = {"id": repo_id, "sha": commit.sha, "private": repo.private, "siblings": files, "tags": []}
        card = _front(commit.files.get("README.md", b"").decode())
        self._json({**told, **({"cardData": yaml.safe_load(card)} if card else {})})

    def _commit(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.at(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[name] = list(repo.branches["main"])
        self._json({})

    def validate(self) -> None:
        try:
            values = yaml.safe_load(_front(self._given()["content"])) or {}
        except yaml.YAMLError as e:
            self._send(400, json.dumps({"errors": [{"message": str(e)}], "warnings": []}).encode())
            return
        base = values.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            told = f'"base_model" with value {base!r} is not valid. Use a model id'
            self._send(400, json.dumps({"errors": [{"message": told}], "warnings": []}).encode())
            return
        self._json({"errors": [], "warnings": [] if values else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, repo_id: str, revision: str) -> None:
        head = self._commit(self._repo(repo_id, write=True), revision)
        self._json({"files": [self._mode(f, head) for f in self._given()["files"]]})

    def _mode(self, file: dict[str, Any], head: Commit) -> dict[str, Any]:
        large, there = file["path"].endswith(self.hub.large), head.files.get(file["path"])
        oid = None
        if there is not None:
            blob = b"blob %d\0" % len(there)
            oid = hashlib.sha256(there).hexdigest() if large else hashlib.sha1(blob + there).hexdigest()
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = self._given()["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.store:
                upload = {"href": f"{self.hub.url}/store/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        # A signed address: whoever has it may write, and no token is to be seen there.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        self.hub.store[oid] = self.body
        self._json({})

    def verify(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        given = self._given()
        if len(self.hub.store.get(given["oid"], b"")) != given["size"]:
            raise Refused(404, "not uploaded")
        self._json({})

    def xet_token(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        self._json({"accessToken": XET_TOKEN, "exp": int(time.time()) + 3600, "casUrl": f"{self.hub.url}/cas"})

    def xorb(self) -> None:
        self._short_lived()
        self.hub.xorbs.append(self.body)
        self._json({"was_inserted": True})

    def shard(self) -> None:
        # A shard says which chunks make which file. Here one file is uploaded at a time, and no chunk of it twice.
        self._short_lived()
        content = b"".join(map(chunks_of, self.hub.xorbs))
        self.hub.xorbs.clear()
        self.hub.store[hashlib.sha256(content).hexdigest()] = content
        self._json({"result": 1})

    def _short_lived(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise Refused(401, "not the token of the store")

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files, message = dict(self._commit(repo, revision).files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise Refused(400, f"LFS pointer of {value['path']} points to nothing")
                files[value["path"]] = self.hub.store[value["oid"]]
            else:
                raise Refused(400, f"unknown key {item['key']}")
        made = repo.commit(revision, message, files)
        self._json({"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.sha}"})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit = self._commit(self._repo(repo_id), revision)
        if name not in commit.files:
            told = {"X-Repo-Commit": commit.sha, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, b"{}", **told)
            return
        content = commit.files[name]
        told = {"X-Repo-Commit": commit.sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._send(200, content, **{"Content-Type": "application/octet-stream", **told})


def _front(text: str) -> str:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return found[1] if found else ""


_ID = r"([\w.-]+/[\w.-]+?)"
_ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{_ID}", "info"),
    (rf"GET /api/models/{_ID}/revision/(.+)", "info"),
    (rf"POST /api/models/{_ID}/branch/(.+)", "branch"),
    (rf"POST /api/models/{_ID}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{_ID}/commit/(.+)", "commit"),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", "batch"),
    (rf"POST /{_ID}\.git/info/lfs/objects/verify", "verify"),
    (r"PUT /store/(\w+)", "put"),
    (rf"GET /api/models/{_ID}/xet-write-token/.+", "xet_token"),
    (r"POST /cas/v1/xorbs/.+", "xorb"),
    (r"POST /cas/v1/shards", "shard"),
    (rf"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", "resolve"),
)
