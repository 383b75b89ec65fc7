"""Judges: Python functions and a chat endpoint compare the answers of base and tuned model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from slimtune.errors import ModelError, UsageError
from slimtune.evaluation.eval_result import AnswerPair, read_eval_result
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.judge import (
    MAX_CHARACTERS,
    add_judge_verdicts,
    build_answer_judge,
    compute_win_rate_and_biases,
)

ASK = [{"role": "user", "content": "Define hope."}]
JUDGES = """
def longer(prompt, a, b): return len(a), len(b)
def named(prompt, a, b): return "A" if "good" in a else "B" if "good" in b else "tie"
def first(prompt, a, b): return (1, 0)
def broken(prompt, a, b): return 1 / 0
def odd(prompt, a, b): return "better"
"""


@pytest.fixture
def judges(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)
    return tmp_path / "judges.py"


@pytest.fixture
def server():
    """A chat endpoint: `replies` by what the first answer contains, `requests` that it got."""

    class Handler(BaseHTTPRequestHandler):
        requests, replies, model, status = [], {}, "tiny-judge", 200

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send({"data": [{"id": self.model}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.requests.append((self.path, dict(self.headers), body))
            first = body["messages"][1]["content"].partition("<A>")[2].partition("</A>")[0]
            reply = next((text for word, text in self.replies.items() if word in first), "[[C]]")
            self.send({"choices": [{"message": {"content": reply}}]})

        def send(self, value):
            data = json.dumps(value).encode()
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(data)

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1", Handler
        http.shutdown()


def judged(judge, pairs):
    answers = [AnswerPair(line=1, prompt=ASK, reference="", base=b, tuned=t, checks={}) for b, t in pairs]
    return compute_win_rate_and_biases("me", add_judge_verdicts(answers, judge), draws=200, seed=0)


def test_wins_ties_and_lengths_by_hand(judges):
    pairs = [("bad", "a good one"), ("good", "bad"), ("bad", "bad too"), ("bad", "good")]
    found = judged(build_answer_judge(f"{judges}:named"), pairs)
    assert [getattr(found, k) for k in ("prompts", "wins", "losses", "ties", "unclear")] == [4, 2, 1, 1, 0]
    assert found.win_rate.value == pytest.approx(2.5 / 4)
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert (found.consistent, found.longer_won) == (1, 1)
    assert (found.base_characters, found.tuned_characters) == (13 / 4, 24 / 4)


def test_preference_for_the_first_place_is_a_tie(judges):
    found = judged(build_answer_judge(f"{judges}:first"), [("a", "b")] * 3)
    assert (found.ties, found.win_rate.value, found.consistent, found.longer_won) == (3, 0.5, 0, None)


def test_scores_decide(judges):
    assert judged(build_answer_judge(f"{judges}:longer"), [("a", "bb"), ("a", "bbb")]).win_rate.value == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "judges.py:broken raised ZeroDivisionError"),
        ("odd", r"returned 'better'\n.*two finite scores, or 'A', 'B' or 'tie'"),
        ("loner", "no function 'loner'; did you mean 'longer'"),
    ],
)
def test_bad_functions(judges, name, message):
    with pytest.raises(UsageError, match=message):
        judged(build_answer_judge(f"{judges}:{name}"), [("a", "b")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("good", "is no judge"),
        ("judge.py:longer", "did you mean 'judges.py'"),
        ("broken.py:f", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_names_of_no_judge(judges, name, message, monkeypatch):
    monkeypatch.chdir(judges.parent)
    (judges.parent / "broken.py").write_text("import nothing_there")
    with pytest.raises(UsageError, match=message):
        build_answer_judge(name)


def test_chat_endpoint_judges_both_orders(server, monkeypatch):
    url, handler = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    handler.replies = {"good": "It is finer: [[B]] no, [[A]]", "bad": "B.", "odd": "I cannot say"}
    found = judged(build_answer_judge(url), [("bad", "good"), ("good", "bad"), ("fair", "fair"), ("odd", "good")])
    assert [getattr(found, k) for k in ("wins", "losses", "ties", "unclear")] == [1, 1, 1, 1]
    assert found.win_rate.value == 0.5
    path, headers, body = handler.requests[0]
    assert (path, body["model"], body["temperature"]) == ("/v1/chat/completions", "tiny-judge", 0)
    assert headers["Authorization"] == "Bearer secret"
    assert "<user>\nDefine hope.\n</user>" in body["messages"][1]["content"]
    build_answer_judge(f"{url}#other")(ASK, "x" * 99999, "y")
    body = handler.requests[-1][2]
    assert body["model"] == "other"
    assert len(body["messages"][1]["content"]) < MAX_CHARACTERS + 200


def test_refusals_redirects_and_silence_are_named(server, monkeypatch):
    url, handler = server
    judge = build_answer_judge(url)
    for status in (307, 401):
        handler.status = status
        with pytest.raises(ModelError, match=f"{url} .*/chat/completions: {status}"):
            judge(ASK, "a", "b")
    monkeypatch.setattr("slimtune.evaluation.judge.MAX_REPLY_BYTES", 3)
    handler.status = 200
    with pytest.raises(ModelError, match=r"\b3 bytes"):
        build_answer_judge(url)
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:1/v1"):
        build_answer_judge("http://127.0.0.1:1/v1")


def test_win_rate_of_a_run(run, judges):
    found = evaluate(run, EvalSettings(generate=3, max_new_tokens=6, judge=f"{judges}:longer"))
    lengths = [(len(g.base), len(g.tuned)) for g in found.generations]
    assert found.win_rate.wins == sum(tuned > base for base, tuned in lengths)
    assert read_eval_result(json.loads((run / "eval-test.json").read_text())).win_rate == found.win_rate
    assert "wins" in (run / "report.html").read_text()
    with pytest.raises(UsageError, match="--judge"):
        EvalSettings(judge="judges.py:longer")
