"""Errors while answers are generated: the answer at fault ends with OpenAI's error, the others are right."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from one_letter_runs import make_one_letter_runs
from serving_client import make_client, send
from waiting import wait_until

from slimtune.errors import RunError
from slimtune.generation.model_runner import CachedBatch
from slimtune.serving.model_server import ModelServer, ServeSettings

ASK = {"model": "says-a", "prompt": "abc", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def runs(base_folder, tiny_tokenizer):
    return make_one_letter_runs(base_folder, tiny_tokenizer())


@pytest.fixture(scope="module")
def server(serve, runs):
    return serve(runs, max_batch=6, max_waiting=32, timeout=20)


@pytest.fixture(scope="module")
def client(server):
    return make_client(server)


def test_a_tiny_temperature_is_greedy(client, server):
    greedy = client.completions.create(**{**ASK, "model": "tiny-base"}).choices[0].text
    for temperature in (1e-300, 5e-324, 1e-40, 9e-6):
        asked = {**ASK, "model": "tiny-base", "temperature": temperature}
        assert client.completions.create(**asked).choices[0].text == greedy
    assert send(server, "GET", "/health")[1]["status"] == "ok"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_null_is_a_field_that_is_not_given(server, path):
    names = ["stop", "temperature", "top_p", "n", "seed", "user", "logit_bias", "max_tokens", "logprobs", "stream",
             "stream_options", "frequency_penalty", "presence_penalty", "suffix", "echo", "best_of", "tools",
             "tool_choice", "response_format", "functions", "metadata", "store", "service_tier"]  # fmt: skip
    given = {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    body = {**dict.fromkeys(names), "model": "says-a", "max_tokens": 2, **given}
    assert send(server, "POST", path, body)[0] == 200
    status, answer = send(server, "POST", path, {**body, next(iter(given)): None})
    assert (status, answer["error"]["param"]) == (400, next(iter(given)))


def fail_at(place, calls, kind=RuntimeError, after=False):
    """Return `place` as it fails in these calls, counted from 0, before or after its work."""
    count = -1

    def run(*args, **kwargs):
        nonlocal count
        count += 1
        done = place(*args, **kwargs) if after and count in calls else None
        if count in calls:
            raise kind("injected")
        return done if done is not None else place(*args, **kwargs)

    return run


PLACES = ["join", "keep", "repeat", "_select", "decode", "prefill", "_keep", "_add_tokens"]


def ask_eight(server):
    """Return what eight clients with different adapters and lengths get: a text, or an error."""
    client = make_client(server)

    def ask(number):
        letter, count = "abcd"[number % 4], 6 + 3 * number
        asked = {"model": f"says-{letter}", "prompt": "x" * (1 + number), "max_tokens": count, "temperature": 0.5}
        try:
            text = client.completions.create(**asked).choices[0].text
        except openai.APIStatusError as error:
            return f"{error.status_code} {error.body['code']}"
        return "right" if text == letter * count else text

    with ThreadPoolExecutor(8) as pool:
        return [*pool.map(ask, range(8))]


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_ends_no_answer_but_its_own(server, monkeypatch, place, kind, after):
    owner = next(o for o in (CachedBatch, server.runner, server.queue) if hasattr(o, place))
    failing = fail_at(getattr(owner, place), {1, 4}, kind, after)
    monkeypatch.setattr(owner, place, (lambda *a: failing(*a)) if owner is CachedBatch else failing)
    answers = ask_eight(server)
    monkeypatch.undo()
    errors = [answer for answer in answers if answer != "right"]
    assert set(errors) <= {"503 out_of_memory" if kind is MemoryError else "500 internal_error"}
    assert len(errors) <= 2
    assert ask_eight(server) == ["right"] * 8
    wait_until(lambda: server.queue.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})
    assert send(server, "GET", "/health")[1]["status"] == "ok"


def test_an_error_of_one_row_in_every_pass_ends_that_row(server, monkeypatch):
    decode, prefill = server.runner.decode, server.runner.prefill
    names = {model.adapter_or_base for model in server.models if model.name == "says-b"}
    monkeypatch.setattr(server.runner, "decode", lambda batch: _fail_for(names, batch.rows) or decode(batch))
    monkeypatch.setattr(
        server.runner, "prefill",
        lambda row, prompt, generated=(): (_fail_for(names, [row]) if generated else None)
        or prefill(row, prompt, generated),
    )  # fmt: skip
    answers = ask_eight(server)
    assert answers == ["right", "500 internal_error", "right", "right"] * 2


def _fail_for(names, rows):
    if any(row.adapter_or_base in names for row in rows):
        raise RuntimeError("injected")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tokenizer_that_fails_ends_its_answer(server, client, monkeypatch, streamed):
    kind = type(server.models[0].tokenizer)
    decode = kind.decode

    def fail_for_a(self, *args, **kwargs):
        text = decode(self, *args, **kwargs)
        if text.endswith("aa"):
            raise RuntimeError("injected")
        return text

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(client.completions.create, model="says-b", prompt="x", max_tokens=60, temperature=0)
        monkeypatch.setattr(kind, "decode", fail_for_a)
        with pytest.raises(openai.APIError) as caught:
            [*client.completions.create(**ASK, stream=True)] if streamed else client.completions.create(**ASK)
        monkeypatch.undo()
        assert caught.value.body["code"] == "internal_error"
        assert other.result().choices[0].text == "b" * 60


def test_a_thread_that_cannot_go_on_ends_the_server(runs, monkeypatch):
    server = ModelServer([str(runs[0])], ServeSettings(port=0))
    server._uvicorn.config.timeout_graceful_shutdown = 1
    ticked = server._uvicorn.on_tick

    async def wait_for_health(counter):
        return bool(asked) and await ticked(counter)

    asked = []
    monkeypatch.setattr(server._uvicorn, "on_tick", wait_for_health)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.run)
        assert send(server, "GET", "/health")[1]["status"] == "ok"
        monkeypatch.setattr(server.queue, "_admit", fail_at(server.queue._admit, range(99)))
        status, answer = send(server, "POST", "/v1/completions", ASK)
        assert (status, answer["error"]["code"]) == (503, "engine_failed")
        status, answer = send(server, "GET", "/health")
        assert (status, answer["status"]) == (503, "failed")
        assert send(server, "POST", "/v1/completions", ASK)[0] == 503
        asked.append(True)
        with pytest.raises(RunError, match="injected"):
            ended.result(timeout=20)


def test_a_thread_that_hangs_keeps_no_request(serve, runs, monkeypatch):
    monkeypatch.setattr("slimtune.serving.openai_api.LATE_SECONDS", 0.2)
    server = serve([runs[0]], timeout=0.5)
    decode = server.runner.decode
    monkeypatch.setattr(server.runner, "decode", lambda batch: (time.sleep(3), decode(batch))[1])
    started = time.monotonic()
    assert send(server, "POST", "/v1/completions", {**ASK, "max_tokens": 100})[0] == 504
    assert time.monotonic() - started < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 130)])
def test_ctrl_c_leaves_no_traceback(runs, signals, code):
    interrupt_while_answering("slow_serve.py", [runs[0]], signals, code, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lock", "loop", "kernel"])
@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 130)])
def test_ctrl_c_ends_a_server_whose_thread_hangs(runs, signals, code, how):
    interrupt_while_answering("hung_serve.py", [runs[0], how], signals, code, timeout=60)


def interrupt_while_answering(program, arguments, signals, code, timeout):
    """Ask a server's program for an answer, send it Ctrl-C so often, and assert its exit code and no traceback."""
    command = [sys.executable, Path(__file__).with_name(program), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=take_sigint)
    port = int(process.stdout.readline())
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="says-a", prompt="x", max_tokens=40, stream=True)
    next(iter(stream))
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors


def take_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup a process ignores it
