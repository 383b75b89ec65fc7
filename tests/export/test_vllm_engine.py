"""The engine that asks a vLLM server: its requests, what it reads from answers, and its errors."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from models_zoo import llama

from slimtune.errors import ModelError, RunError, UsageError
from slimtune.export.expected_logps import AdapterReference, ReferenceText
from slimtune.generation.inference_engines import TextTokenScores, VllmClient


class Vllm(BaseHTTPRequestHandler):
    """Gives answers of vLLM 0.32, as they were recorded."""

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "base", "parent": None}, {"id": "devil", "parent": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        if self.server.error:
            self.send_response(self.server.error[0])
            self.end_headers()
            self.wfile.write(self.server.error[1])
        elif self.path == "/tokenize":
            self.answer({"count": 3, "max_model_len": 1024, "tokens": [1, 4093, 198], "token_strs": None})
        else:
            self.answer({"choices": [self.complete(body)]})

    def complete(self, body):
        likely = {"7": {"logprob": -0.5, "rank": 1}, "8": {"logprob": -1.0, "rank": 2}}
        positions = [None, *({str(i): {"logprob": -9.0, "rank": 4000}, **likely} for i in body["prompt"][1:])]
        ends = body["max_tokens"] > 3
        return {
            "token_ids": [11, 12, 2] if ends else [11, 12, 13][: body["max_tokens"]],
            "finish_reason": "stop" if ends else "length",
            "prompt_logprobs": positions if body.get("prompt_logprobs") else None,
        }

    def answer(self, values):
        self.answer_bytes(json.dumps(values).encode())

    def answer_bytes(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Vllm)
    server.requests, server.error = [], None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_tokenize(server):
    engine, messages = VllmClient(server.url + "/v1/", "devil"), [{"role": "user", "content": "Hello"}]
    assert engine.tokenize("<|im_start|>user\n") == engine.tokenize_chat(messages) == [1, 4093, 198]
    prompt = {"model": "devil", "prompt": "<|im_start|>user\n", "add_special_tokens": False}
    chat = {"model": "devil", "messages": messages}
    assert [r[:2] for r in server.requests] == [("/tokenize", prompt), ("/tokenize", chat)]


def test_score(server):
    scores = VllmClient(server.url, "devil").score([5, 6, 8])
    assert torch.equal(scores.token_log_probs, torch.tensor([-9.0, -1.0], dtype=torch.float64))
    assert scores.top_ids.tolist() == [[7, 8], [7, 8]]
    path, body, _ = server.requests[0]
    expected = {"model": "devil", "prompt": [5, 6, 8], "prompt_logprobs": 20, "max_tokens": 1, "temperature": 0.0}
    assert path == "/v1/completions"
    assert expected.items() <= body.items()
    assert body["repetition_penalty"] == 1.0


@pytest.mark.parametrize(("most", "expected"), [(2, [11, 12]), (3, [11, 12, 13]), (9, [11, 12])])
def test_generate_drops_the_end_token(server, most, expected):
    assert VllmClient(server.url, "devil").generate([5, 6], most) == expected


def test_key_in_no_message(server):
    engine = VllmClient(server.url, "devil", key="very-secret")
    server.error = 401, b'{"error": "Unauthorized"}'
    with pytest.raises(ModelError, match=r"refused /tokenize: 401, \{\"error\": \"Unauthorized\"\}") as caught:
        engine.tokenize("x")
    assert server.requests[0][2] == "Bearer very-secret"
    assert "very-secret" not in str(caught.value)


def test_errors_of_the_server(server):
    with pytest.raises(UsageError, match=r"'devill'.*'devil'"):
        VllmClient(server.url, "devill")
    engine = VllmClient(server.url, "devil")
    message = "Requested prompt logprobs of 30, which is greater than max allowed: 20"
    server.error = 400, json.dumps({"error": {"message": message, "code": 400}}).encode()
    with pytest.raises(RunError, match=message):
        engine.score([1, 2])
    server.error = 200, b"<html>"
    with pytest.raises(ModelError, match="vLLM"):
        engine.tokenize("x")


def test_no_server_and_one_that_hangs():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(ModelError, match=r"vLLM.*refused") as caught:
            VllmClient(url, "devil")
        assert "serve.sh" in caught.value.hint
        s.listen()
        with pytest.raises(ModelError, match=r"/v1/models .*0\.2 s"):
            VllmClient(url, "devil", timeout=0.2)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", ""])
def test_not_an_address(url):
    with pytest.raises(UsageError, match=url):
        VllmClient(url, "devil")


def test_local_requests_ignore_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert VllmClient(server.url, "devil").tokenize("x")


DEEP = b"[" * 100_000 + b"]" * 100_000
NONSENSE = [
    b"{}", b"[]", b"null", b"7", b'"x"', DEEP, b'{"data": 1, "tokens": 1, "choices": 1}', b'{"tokens": ["x"]}',
    b'{"data": [1], "tokens": [1.5], "choices": []}', b'{"choices": [{}]}', b'{"choices": [{"token_ids": "x"}]}',
    b'{"choices": [{"prompt_logprobs": [null, {"8": {"logprob": "x", "rank": 1}}]}]}',
    b'{"choices": [{"prompt_logprobs": [null, {"x": {"logprob": 1, "rank": 1}}]}]}',
    b'{"choices": [{"prompt_logprobs": [null, null]}]}',
]  # fmt: skip


@pytest.mark.parametrize("answer", NONSENSE)
def test_an_answer_that_is_no_vllms_says_so(server, answer, monkeypatch):
    engine = VllmClient(server.url, "devil")
    server.error = 200, answer
    for ask in (lambda: engine.tokenize("x"), lambda: engine.score([5, 8]), lambda: engine.generate([5], 3)):
        with pytest.raises((ModelError, RunError), match="vLLM"):
            ask()
    monkeypatch.setattr(Vllm, "do_GET", lambda handler: handler.answer_bytes(answer))
    with pytest.raises(ModelError, match="vLLM"):
        VllmClient(server.url, "devil")


@pytest.mark.parametrize("cut", [{"token_log_probs": 1}, {"top_ids": 1, "top_log_probs": 1}, {}])
def test_too_few_values_and_unknown_tokens_are_not_compared(cut):
    model = llama()
    text = ReferenceText("", [1, 2, 3, 4])
    reference = AdapterReference(model, None, [text])
    scores = reference.engine.score(text.prompt_and_answer_ids)
    values = {name: tensor[cut.get(name, 0) :] for name, tensor in vars(scores).items()}
    if not cut:
        values["top_ids"] = values["top_ids"] + 10**6
    broken = SimpleNamespace(name="llama.cpp", score=lambda ids: TextTokenScores(**values))
    with pytest.raises(ModelError, match=r"llama\.cpp gives"):
        reference.score(broken, "texts")
