"""`/health` says at each moment whether answers are generated: a thread that hangs is noticed until it goes on."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_client import make_client, send
from waiting import wait_until

from slimtune.generation import step_hang_detector
from slimtune.generation.answer_queue import GeneratedAnswer, SamplingParams
from slimtune.generation.generation_models import GenerationModel
from slimtune.generation.json_client import JsonClient
from slimtune.serving.llama_cpp_server import LlamaCppAnswerQueue
from slimtune.serving.openai_api import OpenAiApi

ASK = {"model": "sailor", "prompt": "abc", "max_tokens": 4}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(step_hang_detector, "MIN_HANG_SECONDS", 0.3)
    monkeypatch.setattr(step_hang_detector, "HANG_FACTOR", 0)


@pytest.fixture(scope="module")
def server(serve, run):
    return serve([run], max_batch=4)


def get_health(server):
    status, answer = send(server, "GET", "/health")
    return status, answer["status"]


@pytest.mark.parametrize("place", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["waits for a lock", "loops"])
def test_a_step_that_hangs_is_unhealthy_until_it_ends(server, monkeypatch, place, how):
    go_on, owner = threading.Event(), server.runner
    work = getattr(owner, place)

    def hang(*args):
        while how == "loops" and not go_on.is_set():
            sum(range(1000))
        go_on.wait()
        return work(*args)

    monkeypatch.setattr(owner, place, hang)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(send, server, "POST", "/v1/completions", ASK)
        try:
            wait_until(lambda: get_health(server) == (503, "hangs"))
            answer = send(server, "GET", "/health")[1]
            assert answer["reason"]
            assert answer["running"] == 1
        finally:
            go_on.set()
        assert asked.result()[0] == 200
    idle = {"status": "ok", "running": 0, "waiting": 0, "cached_tokens": 0}
    wait_until(lambda: send(server, "GET", "/health") == (200, idle))


def test_a_receiver_that_hangs_blocks_no_request(server, monkeypatch):
    go_on = threading.Event()
    model = next(model for model in server.models if model.name == "sailor")
    late = GeneratedAnswer(model, [5, 6], SamplingParams(), lambda piece: go_on.wait(), deadline=time.monotonic())
    try:
        server.queue.submit([late])
        wait_until(lambda: get_health(server) == (503, "hangs"))
        with make_client(server).completions.create(**ASK, stream=True, timeout=60):  # it waits, and can be dropped
            assert get_health(server) == (503, "hangs")
    finally:
        go_on.set()
    wait_until(lambda: get_health(server) == (200, "ok"))


def test_an_idle_server_is_healthy(server):
    time.sleep(0.5)
    assert get_health(server) == (200, "ok")


class EngineOfChild:
    """An engine whose events come from another process."""

    def __init__(self, port):
        self.client = JsonClient("llama.cpp server", f"http://127.0.0.1:{port}")

    def stream(self, ids, *, timeout, **settings):
        return self.client.stream("/completion", settings)

    def close(self):
        pass


@pytest.fixture
def child():
    command = [sys.executable, Path(__file__).with_name("stream_words.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_llama_cpp_that_gives_no_event_is_unhealthy_until_it_does(child, tiny_tokenizer):
    queue = LlamaCppAnswerQueue({"x": EngineOfChild(int(child.stdout.readline()))}, max_batch=2, max_waiting=2)
    api, ended = OpenAiApi([], queue, (), None, 60), threading.Event()

    def get_status():
        answer = asyncio.run(api.health(None))
        return answer.status_code, json.loads(answer.body)["status"]

    model = GenerationModel("x", tiny_tokenizer(), frozenset(), None)
    answers = [
        GeneratedAnswer(model, [5] * 9, SamplingParams(100), lambda p: p.finish_reason and ended.set())
        for _ in range(2)
    ]  # fmt: skip
    queue.submit(answers)
    wait_until(lambda: all(answer.num_tokens > 2 for answer in answers))
    assert get_status() == (200, "ok")
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: get_status() == (503, "hangs"))
    child.send_signal(signal.SIGCONT)
    wait_until(ended.is_set)
    wait_until(lambda: get_status() == (200, "ok"))
    wait_until(lambda: queue.count()["running"] == 0)
    assert get_status() == (200, "ok")
    assert [answer.text for answer in answers] == ["a" * 100] * 2
    queue.close()
