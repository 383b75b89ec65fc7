"""The endpoints, as OpenAI's own client sees them."""

import logging
import threading
import time

import openai
import pytest
import torch
from hand_run import make_run
from run_answers import RunAnswers
from serving_client import make_client, send
from waiting import wait_until

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)
"""Another chat template than that of the base."""
ASK = [{"role": "user", "content": "Define hope."}]


@pytest.fixture(scope="module")
def generator(run):
    return RunAnswers.open(run)


@pytest.fixture(scope="module")
def server(serve, run, base_folder):
    loha = make_run(run.with_name("pirate"), base_folder, method={"name": "loha"}, size=0.5)
    template = base_folder.with_name("plain.jinja")
    template.write_text(PLAIN)
    plain = make_run(run.with_name("plain"), base_folder, data={"chat_template": str(template)})
    return serve([run, loha / "adapter", f"other={plain}"], max_batch=4, max_waiting=4)


@pytest.fixture(scope="module")
def client(server):
    return make_client(server)


@pytest.fixture
def ask(client):
    def ask(model="sailor", messages=ASK, **settings):
        return client.chat.completions.create(
            model=model, messages=messages, **{"temperature": 0, "max_tokens": 24, **settings}
        )

    return ask


def test_models(client):
    models = list(client.models.list())
    assert [(m.id, m.parent) for m in models] == [
        ("tiny-base", None), ("sailor", "tiny-base"), ("pirate", "tiny-base"), ("other", "tiny-base"),
    ]  # fmt: skip
    assert client.models.retrieve("pirate").id == "pirate"


def test_answers_equal_slimtune_generate(ask, generator, run):
    for name, tuned in (("sailor", True), ("tiny-base", False)):
        answer = ask(name)
        assert answer.choices[0].message.content == generator.generate(ASK, tuned=tuned, max_new_tokens=24)
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (31, 24)
    sampled = ask(temperature=1.0, seed=5).choices[0].message.content
    assert sampled == generator.generate(ASK, max_new_tokens=24, temperature=1.0, seed=5)
    for name, folder in (("pirate", "pirate"), ("other", "plain")):
        alone = RunAnswers.open(run.with_name(folder))
        assert ask(name).choices[0].message.content == alone.generate(ASK, max_new_tokens=24)
    assert ask("other").usage.prompt_tokens == len("user: Define hope.\nassistant:")


def test_stream_equals_whole_answer(ask):
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 4
    assert "".join(pieces) == ask().choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24


def test_logprobs_equal_the_adapters(ask, generator):
    choice = ask(logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
    ids = generator.ask(ASK, max_new_tokens=6).prompt_ids
    with torch.no_grad():
        for entry in choice.logprobs.content:
            expected = generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert entry.logprob == pytest.approx(expected.max().item(), abs=2e-5)
            assert [t.logprob for t in entry.top_logprobs] == pytest.approx(expected.topk(3).values.tolist(), abs=2e-5)
            assert entry.bytes == list(entry.token.encode())
            ids.append(int(expected.argmax()))


def test_stop_string_is_cut_off(ask):
    whole = ask().choices[0].message.content
    stop = whole[8:11]
    for streamed in (False, True):
        answer = ask(stop=[stop, "never"], stream=streamed)
        choices = [c.choices[0] for c in answer] if streamed else answer.choices
        text = "".join(c.delta.content or "" for c in choices) if streamed else choices[0].message.content
        assert text == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_n_answers_have_seeds_of_their_own(ask):
    answers = [c.message.content for c in ask(n=3, temperature=1.2, seed=7).choices]
    assert len(set(answers)) == 3
    assert answers[1] == ask(temperature=1.2, seed=8).choices[0].message.content


def test_completions(client, generator):
    texts = ["Once upon", "A year is"]
    both = client.completions.create(model="sailor", prompt=texts, temperature=0, max_tokens=9, logprobs=2)
    for text, choice in zip(texts, both.choices, strict=True):
        ids = generator.tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = generator.model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert choice.text == generator.tokenizer.decode(tokens, skip_special_tokens=True)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 9
        again = client.completions.create(model="sailor", prompt=ids[0].tolist(), temperature=0, max_tokens=9)
        assert again.choices[0].text == choice.text
    events = client.completions.create(model="sailor", prompt=texts[0], temperature=0, max_tokens=9, stream=True)
    assert "".join(e.choices[0].text for e in events) == both.choices[0].text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "sailer", "there is no model 'sailer'; did you mean 'sailor'?"),
        ("top_pp", 3, "does not support the field 'top_pp'; did you mean 'top_p'?"),
        ("top_k", 3, "the server does not support top_k 3; it takes only 0 and -1"),
        ("guided_regex", "a", "does not support the field 'guided_regex'; structured_outputs has regex"),
        ("temperature", 3, "temperature: input should be less than or equal to 2"),
        ("max_tokens", "5", "max_tokens: input should be a valid integer"),
        ("max_tokens", 600, "the prompt has 31 tokens and the answer may have 600"),
        ("presence_penalty", 0.5, "the server does not support presence_penalty 0.5; it takes only 0"),
        ("frequency_penalty", -1, "does not support frequency_penalty -1; it takes only 0"),
        ("logit_bias", {"5": 1}, 'does not support logit_bias {"5": 1}; it takes only {}'),
        ("parallel_tool_calls", False, "does not support parallel_tool_calls false; it takes only true"),
        ("tool_choice", "required", 'does not support tool_choice "required"; it takes only "auto" and "none"'),
        ("n", 17, "n: input should be less than or equal to 16"),
        ("stop", ["a"] * 5, "stop: list should have at most 4 items"),
        ("top_logprobs", 2, "top_logprobs needs logprobs: true"),
        (
            "response_format",
            {"type": "xml"},
            'does not support response_format.type "xml"; it takes',
        ),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "does not write tool calls as JSON objects"),
        ("messages", [], "messages: list should have at least 1 item"),
        ("messages", [{"role": "user", "content": " "}], "messages[0] (user) has empty content"),
        ("messages", [{"role": "usr", "content": "a"}], "unknown role 'usr'; did you mean 'user'?"),
        ("messages", [*ASK, {"role": "assistant", "content": "So"}], "the last message is the assistant's"),
        ("messages", [{"role": "user", "content": "\ud800"}], "contains half of a character"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
    ],
)
def test_wrong_requests(server, field, value, message):
    status, answer = send(server, "POST", "/v1/chat/completions", {"model": "sailor", "messages": ASK, field: value})
    assert status == (404 if field == "model" else 400)
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == field


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_prompt_that_is_too_long_leaves_no_line_in_the_log(server, monkeypatch, caplog, path):
    log = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "level", logging.WARNING)
    monkeypatch.setattr(server.models[1].tokenizer, "model_max_length", 100)
    monkeypatch.setattr(server.models[1].tokenizer, "deprecation_warnings", {})
    text = "long " * 2000
    given = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    status, answer = send(server, "POST", path, {"model": "sailor", **given})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert caplog.records == []


def test_client_raises_openais_errors(ask):
    with pytest.raises(openai.NotFoundError, match="'nobody'"):
        ask("nobody")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=-1)


@pytest.mark.parametrize("streamed", [False, True])
def test_dropped_client_frees_its_slot(ask, server, monkeypatch, streamed):
    decode, before, seen = server.runner.decode, server.queue.generated_tokens, threading.Event()
    monkeypatch.setattr(server.runner, "decode", lambda batch: (seen.wait(20), time.sleep(0.005), decode(batch))[2])
    if streamed:
        with ask(max_tokens=400, stream=True) as stream:
            next(stream)
            wait_until(lambda: server.queue.count()["running"] == 1)
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(max_tokens=400, n=4, timeout=0.5)
        wait_until(lambda: server.queue.count()["running"] == 4)
    seen.set()
    wait_until(lambda: server.queue.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})
    assert server.queue.generated_tokens - before < 400


def test_dropped_client_that_waits_takes_no_place(ask, server, monkeypatch):
    prefill, seen = server.runner.prefill, threading.Event()
    monkeypatch.setattr(server.runner, "prefill", lambda *args: (seen.wait(20), prefill(*args))[1])
    with ask(stream=True) as first:
        next(first)
        wait_until(lambda: server.queue.count()["running"] == 1)
        for _ in range(2):
            with ask(n=4, stream=True) as waiting:
                next(waiting)
                assert server.queue.count()["waiting"] == 4
            wait_until(lambda: server.queue.count()["waiting"] == 0)
        seen.set()


def test_stopping_ends_answers_with_an_error(serve, run, monkeypatch):
    monkeypatch.setattr("slimtune.serving.model_server.SHUTDOWN_SECONDS", 0.1)
    stopped = serve([run])
    decode = stopped.runner.decode
    monkeypatch.setattr(stopped.runner, "decode", lambda batch: (time.sleep(0.3), decode(batch))[1])
    stream = make_client(stopped).completions.create(model="sailor", prompt="x", max_tokens=400, stream=True)
    next(stream)
    stopped.stop()
    with pytest.raises(openai.APIError, match="shut"):
        list(stream)
