"""What a request can do, and what it cannot."""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_client import connect, make_client, send
from waiting import wait_until

from slimtune.errors import UsageError
from slimtune.serving import openai_api as app
from slimtune.serving.model_server import ModelServer, ServeSettings

ASK = {"model": "sailor", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(serve, run):
    return serve([run], max_batch=1, max_waiting=1, timeout=1.0)


def test_it_listens_on_this_machine_only(server, run):
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0"):
        ModelServer([str(run)], ServeSettings(host="0.0.0.0"))


def test_a_port_that_is_taken(server, run):
    port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    with pytest.raises(UsageError, match=rf"127\.0\.0\.1.*\b{port}\b"):
        ModelServer([str(run)], ServeSettings(port=port))


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil", "[::1]evil.example",
     "[::1]:80evil.example", "localhost:8000:evil.example"],
)  # fmt: skip
def test_another_host_name_is_refused(server, host):
    for method, path, body in (("GET", "/v1/models", None), ("POST", CHAT, ASK)):
        status, answer = send(server, method, path, body, Host=host)
        assert (status, answer["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000"])
def test_names_of_this_machine(server, host):
    assert send(server, "GET", "/v1/models", Host=host)[0] == 200


def test_no_other_origin_may_read_or_ask(server):
    connection = connect(server)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        connection.request(method, "/v1/models", headers=headers)
        answer = connection.getresponse()
        answer.read()
        assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert send(server, "POST", CHAT, ASK, **{"Content-Type": kind})[0] == 415


def test_api_key(serve, run):
    server = serve([run], api_key="sésame")
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic sésame".encode()}):
        status, answer = send(server, "GET", "/v1/models", **headers)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
    assert send(server, "GET", "/health")[0] == 401
    assert send(server, "GET", "/v1/models", Authorization="Bearer sésame".encode())[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"a": "\xff"}', 400, "no JSON"),
        (b"[1]", 400, "the body"),
        (b'{"model": "sailor", "model": "pirate"}', 400, "has the key 'model' twice"),
        (b'{"model": "sailor", "messages": [], "temperature": NaN}', 400, "temperature: input should be a finite"),
        (json.dumps({**ASK, "x": "y" * 2**20}).encode(), 413, "more than 1,048,576 bytes"),
        (json.dumps({**ASK, "messages": [{**ASK["messages"][0], "content": "y" * 9999}]}).encode(), 400, "takes 512"),
        (json.dumps({**ASK, "\ud800": 1}).encode(), 400, "unable to parse raw data as a unicode string"),
        (json.dumps({**ASK, "model": "\ud800"}).encode(), 404, "there is no model"),
    ],
)  # fmt: skip
def test_bodies(server, body, status, message):
    found, answer = send(server, "POST", CHAT, body)
    assert (found, message in answer["error"]["message"]) == (status, True), answer


@pytest.mark.parametrize("prompt", [[10**6], [-1], [2**70], [[]], [True], ""])
def test_token_ids_are_those_of_the_model(server, prompt):
    status, answer = send(server, "POST", "/v1/completions", {"model": "sailor", "prompt": prompt})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_without_end(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    connection = connect(server)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    chunked = connect(server)
    chunked.request("POST", CHAT, iter([b"x" * 2**19] * 3), {"Content-Type": "application/json"}, encode_chunked=True)
    assert chunked.getresponse().status == 413


watched: list[str] = []
is_watching = False


def watch(event, args):
    if is_watching and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "exec"):
        watched.append(f"{event} {args[0]!r}")


def test_no_path_reaches_the_file_system(server):
    global is_watching
    send(server, "POST", CHAT, ASK)
    sys.addaudithook(watch)
    is_watching = True
    try:
        for name in ("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "sailor/../sailor", "~root", "adapter\0"):
            assert send(server, "POST", CHAT, {**ASK, "model": name})[0] == 404
            assert send(server, "POST", CHAT, {**ASK, "messages": [{"role": "user", "content": name}]})[0] == 200
        for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/../etc/passwd", "/%2e%2e/etc/passwd", "/static/", "/docs"):
            assert send(server, "GET", path)[0] == 404
    finally:
        is_watching = False
    assert [event for event in watched if "passwd" in event or "etc" in event or "exec" in event] == []
    assert [event for event in watched if event.startswith(("open '/", "os.", "subprocess"))] == []


def test_more_requests_than_may_wait(server):
    client = make_client(server)
    streams = []
    for count in ("running", "waiting"):
        ask = {**ASK, "max_tokens": 470}
        streams.append(client.chat.completions.create(**ask, stream=True, temperature=0))
        wait_until(lambda count=count: server.queue.count()[count] == 1)
    status, answer = send(server, "POST", CHAT, ASK)
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    for stream in streams:
        stream.close()
    wait_until(lambda: server.queue.count()["running"] == 0)
    assert send(server, "POST", CHAT, ASK)[0] == 200


def test_an_answer_that_takes_too_long(server, monkeypatch):
    decode = server.runner.decode
    monkeypatch.setattr(server.runner, "decode", lambda batch: (time.sleep(0.1), decode(batch))[1])
    status, answer = send(server, "POST", CHAT, {**ASK, "max_tokens": 400, "temperature": 0})
    assert (status, answer["error"]["code"]) == (504, "timeout")


def test_half_a_request_line_does_not_stop_the_others(server):
    port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /v1/chat/comp")
        assert send(server, "GET", "/health")[0] == 200


def open_connections(server, count, data=b"", close=False):
    port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for connection in opened:
        connection.settimeout(20)
        connection.sendall(data)
    return opened


def test_a_header_that_does_not_arrive_in_time(serve, run, monkeypatch):
    monkeypatch.setattr("slimtune.extras.http_connections.HEADER_SECONDS", 0.3)
    server = serve([run])
    server._uvicorn.config.timeout_keep_alive = 1
    (silent,), (half,) = open_connections(server, 1), open_connections(server, 1, b"GET /health HTTP/1.1\r\nHost:")
    (second,) = open_connections(server, 1, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert second.recv(1000).startswith(b"HTTP/1.1 200")
    for connection in (silent, half):
        assert is_closed(connection)
    second.sendall(b"GET")  # a byte of the next header ends uvicorn's own time limit
    assert is_closed(second)


def is_closed(connection):
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
     b"Content-Length: 9\r\n\r\n"],
)  # fmt: skip
def test_slow_clients_take_nobodys_place(serve, run, data):
    server = serve([run], max_batch=1, max_waiting=1)
    slow = open_connections(server, 110, data)  # 102 requests may be connected
    try:
        for _ in range(3):
            assert send(server, "POST", CHAT, ASK)[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_a_client_that_does_not_read_is_disconnected(serve, run, monkeypatch):
    monkeypatch.setattr("slimtune.extras.http_connections.UNREAD_SECONDS", 0.3)
    server = serve([run], max_batch=4)
    (unread,) = open_connections(server, 1)
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({**ASK, "n": 4, "max_tokens": 400, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    unread.sendall(head.encode() + b"\r\n\r\n" + body)
    wait_until(lambda: server.queue.count()["running"] == 4)
    wait_until(lambda: server.queue.count()["running"] == 0 and not server._uvicorn.server_state.tasks)


def make_head(path, content=b"", more="", method="POST"):
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return head.encode() + (f"Content-Length: {len(content)}\r\n" if content else "").encode() + b"\r\n" + content


CHUNKED = "Transfer-Encoding: chunked\r\n"
LONG = json.dumps({**ASK, "max_tokens": 470, "stream": True}).encode()


@pytest.mark.parametrize(
    ("data", "then"),
    [
        (make_head(CHAT, more=CHUNKED) + b"zz\r\n", b""),
        (make_head(CHAT, more=CHUNKED).replace(b"localhost", b"evil") + b"5\r\nabcde\r\nzz\r\n", b""),
        (make_head(CHAT, more=CHUNKED).replace(b"localhost", b"evil") + b"5\r\nabcde\r\n", b"zz\r\n"),
        (make_head(CHAT, LONG, "Connection: close\r\n") + b"more", b""),
        (make_head(CHAT, LONG, "Connection: close\r\n"), b"more"),
        (make_head(CHAT, json.dumps(ASK).encode()) + b"\0\xff\r\n\r\n", b""),
        (make_head("/health", more="Connection: upgrade\r\nUpgrade: websocket\r\n", method="GET"), b"\0\r\n\r\n"),
    ],
)
def test_what_is_no_http_leaves_no_traceback(serve, run, caplog, data, then):
    server = serve([run])
    (client,) = open_connections(server, 1, data)
    if then:
        assert client.recv(1000).startswith(b"HTTP/1.1 ")
        client.sendall(then)
    assert is_closed(client)
    wait_until(lambda: server.queue.count()["running"] == 0 and not server._uvicorn.server_state.tasks)
    assert [record.getMessage() for record in caplog.records if record.name.startswith(("uvicorn", "asyncio"))] == []


def test_pipelined_requests_are_answered_in_turn(server):
    health = make_head("/health", method="GET")
    data = (
        health * 50
        + make_head(CHAT, json.dumps(ASK).encode())
        + health.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    )
    (client,) = open_connections(server, 1, data)
    answers = b""
    while part := client.recv(1 << 16):
        answers += part
    assert answers.count(b"HTTP/1.1 200 OK") == 52
    assert answers.index(b"chat.completion") > answers.index(b'"status": "ok"')
    assert answers.endswith(b"}")


@pytest.mark.parametrize("more", [b"GET /health", b"x" * 200_000])
def test_a_client_that_leaves_after_its_next_request_frees_its_slot(serve, run, monkeypatch, more):
    server = serve([run])
    decode = server.runner.decode
    monkeypatch.setattr(server.runner, "decode", lambda batch: (time.sleep(0.01), decode(batch))[1])
    (client,) = open_connections(server, 1, make_head(CHAT, LONG.replace(b"true", b"false")))
    wait_until(lambda: server.queue.count()["running"] == 1)
    client.sendall(more)
    time.sleep(0.1)
    client.close()
    wait_until(lambda: server.queue.count()["running"] == 0)
    assert server.queue.generated_tokens < 400


def test_a_bug_is_logged_and_not_shown(server, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("secret")

    for place in ("parse_request_body", "_count_usage"):
        caplog.clear()
        monkeypatch.setattr(app, place, fail)
        status, answer = send(server, "POST", CHAT, ASK)
        monkeypatch.undo()
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer["error"]["message"]
        assert "secret" in caplog.text


def test_large_answers_are_written_beside_other_requests(server, monkeypatch):
    writing, go_on, count_usage = threading.Event(), threading.Event(), app._count_usage

    def wait(choices):
        writing.set()
        assert go_on.wait(20)
        return count_usage(choices)

    monkeypatch.setattr(app, "_count_usage", wait)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(send, server, "POST", CHAT, ASK)
        assert writing.wait(20)
        assert send(server, "GET", "/health")[0] == 200
        go_on.set()
        assert asked.result()[0] == 200


def test_a_models_name_may_have_slashes(serve, run):
    server = serve([f"org/captain={run}"])
    assert send(server, "GET", "/v1/models/org/captain")[1]["id"] == "org/captain"
    assert make_client(server).models.retrieve("org/captain").id == "org/captain"
