"""The engine that asks a vLLM server: its requests, what it reads from answers, what it says when there are none."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from slimtune.errors import RunError, UsageError
from slimtune.export.engines.vllm import VllmServer


class Vllm(BaseHTTPRequestHandler):
    """Speaks the answers of vLLM 0.32, as they were recorded."""

    def do_GET(self):
        self.say({"object": "list", "data": [{"id": "base", "parent": None}, {"id": "devil", "parent": "base"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked, self.headers.get("Authorization")))
        if self.server.broken:
            self.send_response(self.server.broken[0])
            self.end_headers()
            self.wfile.write(self.server.broken[1])
        elif self.path == "/tokenize":
            self.say({"count": 3, "max_model_len": 1024, "tokens": [1, 4093, 198], "token_strs": None})
        else:
            self.say({"choices": [self.completion(asked)]})

    def completion(self, asked):
        places = [None] + [
            {
                str(i): {"logprob": -9.0, "rank": 4000},
                "7": {"logprob": -0.5, "rank": 1},
                "8": {"logprob": -1.0, "rank": 2},
            }
            for i in asked["prompt"][1:]
        ]
        ends = asked["max_tokens"] > 3
        made = {"token_ids": [11, 12, 2] if ends else [11, 12, 13][: asked["max_tokens"]]}
        made["finish_reason"] = "stop" if ends else "length"
        return made | {"prompt_logprobs": places if asked.get("prompt_logprobs") else None}

    def say(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Vllm)
    server.asked, server.broken = [], None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_tokens_are_asked_for_as_a_chat_request_gets_them(server):
    assert VllmServer(server.url + "/v1/", "devil").tokens("<|im_start|>user\n") == [1, 4093, 198]
    path, asked, _ = server.asked[0]
    assert path == "/tokenize"
    assert asked == {"model": "devil", "prompt": "<|im_start|>user\n", "add_special_tokens": False}


def test_a_chat_is_rendered_by_the_server(server):
    messages = [{"role": "user", "content": "Hello"}]
    assert VllmServer(server.url, "devil").chat_tokens(messages) == [1, 4093, 198]
    assert server.asked[0][1] == {"model": "devil", "messages": messages}


def test_scores_are_of_every_token_but_the_first_and_the_likeliest_in_order(server):
    scores = VllmServer(server.url, "devil", likely=2).scores([5, 6, 8])
    assert torch.equal(scores.own, torch.tensor([-9.0, -1.0], dtype=torch.float64))
    assert scores.likely.tolist() == [[7, 8], [7, 8]]
    assert scores.values.tolist() == [[-0.5, -1.0], [-0.5, -1.0]]
    path, asked, _ = server.asked[0]
    assert path == "/v1/completions"
    assert (asked["model"], asked["prompt"], asked["prompt_logprobs"]) == ("devil", [5, 6, 8], 2)
    assert (asked["max_tokens"], asked["temperature"], asked["repetition_penalty"]) == (1, 0.0, 1.0)


@pytest.mark.parametrize(("most", "wanted"), [(2, [11, 12]), (3, [11, 12, 13]), (9, [11, 12])])
def test_an_answer_has_no_end_of_text(server, most, wanted):
    assert VllmServer(server.url, "devil").answer([5, 6], most) == wanted


def test_a_key_goes_along_and_into_no_message(server):
    engine = VllmServer(server.url, "devil", key="very-secret")
    server.broken = 401, b'{"error": "Unauthorized"}'
    with pytest.raises(RunError, match=r"refused /tokenize: 401, \{\"error\": \"Unauthorized\"\}") as caught:
        engine.tokens("x")
    assert server.asked[0][2] == "Bearer very-secret"
    assert "very-secret" not in str(caught.value)


def test_an_unknown_model_is_refused_with_the_nearest(server):
    with pytest.raises(UsageError, match="serves no model 'devill'; did you mean 'devil'") as caught:
        VllmServer(server.url, "devill")
    assert "'base', 'devil'" in caught.value.expected


def test_the_servers_own_words_are_passed_on(server):
    engine = VllmServer(server.url, "devil")
    words = "Requested prompt logprobs of 30, which is greater than max allowed: 20"
    server.broken = 400, json.dumps({"error": {"message": words, "code": 400}}).encode()
    with pytest.raises(RunError, match=words):
        engine.scores([1, 2])


def test_what_is_no_vllm_server_is_said(server):
    engine = VllmServer(server.url, "devil")
    server.broken = 200, b"<html>"
    with pytest.raises(RunError, match="is no vLLM server: no JSON"):
        engine.tokens("x")


def test_no_server_is_said_with_how_to_start_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(RunError, match=f"no vLLM server answers at http://127.0.0.1:{port}: .*refused") as caught:
        VllmServer(f"http://127.0.0.1:{port}", "devil")
    assert "serve.sh" in caught.value.hint


def test_a_server_that_hangs_is_given_up():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(RunError, match=r"did not answer /v1/models in 0.2 s"):
            VllmServer(f"http://127.0.0.1:{s.getsockname()[1]}", "devil", timeout=0.2)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match="is no address of a server"):
        VllmServer(url, "devil")


def test_a_proxy_for_the_outside_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert VllmServer(server.url, "devil").models() == ["base", "devil"]
