"""Many clients at once over adapters that each say a letter of their own."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from one_letter_runs import LETTERS, make_one_letter_runs
from serving_client import make_client
from waiting import wait_until

CLIENTS, REQUESTS = 16, 2


@pytest.fixture(scope="module")
def server(serve, base_folder, tiny_tokenizer):
    return serve(make_one_letter_runs(base_folder, tiny_tokenizer()), max_batch=6, max_waiting=CLIENTS)


def test_no_client_ever_gets_another_adapter(server):
    client = make_client(server)

    def talk(number: int) -> list[str]:
        draw, wrong = random.Random(number), []
        for _ in range(REQUESTS):
            letter = draw.choice(LETTERS)
            messages = [{"role": "user", "content": "x" * draw.randint(1, 60)}]
            settings = {"max_tokens": draw.randint(1, 16), "temperature": draw.choice([0, 0.5])}
            kind = draw.choice(["whole", "stream", "drop"])
            answer = client.chat.completions.create(
                model=f"says-{letter}", messages=messages, stream=kind != "whole", **settings
            )
            if kind == "whole":
                text = answer.choices[0].message.content
            else:
                text = ""
                for chunk in answer:
                    text += chunk.choices[0].delta.content or ""
                    if kind == "drop" and text:
                        answer.close()
                        break
            complete = kind == "drop" or len(text) == settings["max_tokens"]
            if set(text) != {letter} or not complete:
                wrong.append(f"{kind} {letter}: {text!r}")
        return wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert [each for wrong in pool.map(talk, range(CLIENTS)) for each in wrong] == []
    wait_until(lambda: server.queue.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})


def test_requests_for_different_adapters_share_a_batch(server, monkeypatch):
    seen, decode = [], server.runner.decode
    monkeypatch.setattr(
        server.runner,
        "decode",
        lambda batch: (seen.append({row.adapter_or_base for row in batch.rows}), decode(batch))[1],
    )
    client = make_client(server)
    settings = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60}
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda m: client.chat.completions.create(model=f"says-{m}", **settings), LETTERS))
    assert [text.choices[0].message.content for text in texts] == [letter * 60 for letter in LETTERS]
    assert max(map(len, seen)) >= 3
