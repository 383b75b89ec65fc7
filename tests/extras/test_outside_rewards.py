"""Rewards by a program, a server, and code that runs with limits."""

import json
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from slimtune.errors import RunError
from slimtune.extras.rewards import outside_rewards
from slimtune.extras.rewards.code_reward import can_disable_network, find_code, passes_tests
from slimtune.extras.rewards.reasoning_gym_tasks import make_rows
from slimtune.extras.rewards.reward_specs import (
    find_reward_error,
    load_reward,
    make_reward_path_absolute,
    make_short_reward_name,
)
from slimtune.extras.rewards.reward_workers import AnswersToScore, RewardWorkers

ANSWERS = AnswersToScore(["?"] * 3, ["a", "bb", "ccc"], {"wanted": [1, 2, 4]}, [4, 5, 6], "rows.jsonl")


def score(spec, answers=ANSWERS, timeout=20.0):
    workers = RewardWorkers([spec], [], timeout)
    try:
        return [values[0] for values in workers.score(answers)]
    finally:
        for process in workers.processes:
            process.kill()


def command(code):
    start = "import sys, json; rows = [json.loads(line) for line in sys.stdin]\n"
    return f"command:{shlex.quote(sys.executable)} -c {shlex.quote(start + code)}"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["prompts, completions", "prompts, completions, wantd, **columns"])
def test_function_with_other_arguments_is_told_what_it_is_called_with(arguments, tmp_path):
    (tmp_path / "rewards.py").write_text(f"def reward({arguments}):\n    return [1.0] * len(completions)\n")
    with pytest.raises(RunError, match="prompts, completions, wanted"):
        score(f"{tmp_path}/rewards.py:reward")


@pytest.mark.slow
def test_command_gets_rows_and_prints_numbers():
    spec = command("for r in rows: print(len(r['completion']) / r['wanted'])")
    assert score(spec) == [1, 1, 0.75]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("for r in rows: print('nan' if r['wanted'] == 4 else 1)", "NaN, for line 6"),
        ("for r in rows: print('good' if r['wanted'] == 4 else 1)", "no number, for line 6"),
        ("print(*[r['wanted'] for r in rows if r['wanted'] < 4])", "2 numbers for 3 answers"),
        ("print(*[1 for r in rows])\nsys.exit(3 if rows[-1]['wanted'] == 4 else 0)", "exit code 3, for line 6"),
        ("import time; time.sleep(9 if rows[-1]['wanted'] == 4 else 0)\nprint(*[1 for r in rows])", "longer"),
    ],
    ids=["NaN", "text", "too few", "exit code", "hang"],
)
def test_command_that_fails_is_named_with_its_row(code, problem):
    with pytest.raises(RunError, match=problem) as caught:
        score(command(code), timeout=2)
    assert caught.value.code == "reward-failed"


@pytest.fixture
def server():
    """A server that answers with the next of `replies`, each a status and a value; it keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, value = self.server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.requests, http.replies = [], []
        http.url = f"http://127.0.0.1:{http.server_port}/judge"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


def test_server_gets_one_request_for_a_batch(server):
    server.replies = [(200, {"rewards": [1, 2, 3]})]
    assert load_reward(server.url)(prompts=["?"] * 3, completions=["a", "b", "c"], n=[1, 2, 3]) == [1, 2, 3]
    assert server.requests == [{"prompts": ["?"] * 3, "completions": ["a", "b", "c"], "columns": {"n": [1, 2, 3]}}]


def test_busy_server_is_asked_again_but_not_for_ever(server, monkeypatch):
    monkeypatch.setattr(outside_rewards, "FIRST_WAIT_SECONDS", 0.0)
    judge = load_reward(server.url)
    server.replies = [(503, None), (429, None), (200, [1.0])]
    assert judge(prompts=["?"], completions=["a"]) == [1.0]
    server.replies = [(503, None)] * 9
    with pytest.raises(outside_rewards.RewardUnavailableError, match="503"):
        judge(prompts=["?"], completions=["a"])
    assert len(server.requests) == 3 + outside_rewards.TRIES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "value", "problem"),
    [
        (404, None, "responds with 404"),
        (200, {"scores": [1]}, 'no "rewards"'),
        (200, {"rewards": [1, 2, None]}, "None, which is no number, for line 6"),
        (200, {"rewards": [1]}, "1 numbers for 3 answers"),
    ],
)
def test_server_that_fails_is_named(status, value, problem, server):
    server.replies = [(status, value)] * 9
    with pytest.raises(RunError, match=problem):
        score(server.url)


PASSES = "def add(a, b):\n    return a + b"
TESTS = "assert add(1, 2) == 3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "passed"),
    [
        (PASSES, True),
        ("def add(a, b): return 3 if a == 1 else 0\nassert False", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("x = bytearray(2 << 30)\n" + PASSES, False),
        ("open('big', 'wb').write(bytes(2 << 20))\n" + PASSES, False),
        ("print('words' * 10**6)\n" + PASSES, True),
        ("def add(", False),
    ],
    ids=["right", "wrong", "exit", "hard exit", "endless", "memory", "file", "prints", "syntax"],
)
def test_code_runs_within_limits(code, passed):
    assert passes_tests(code, TESTS) == passed


@pytest.mark.slow
@pytest.mark.skipif(not can_disable_network(), reason="this machine lets no user start a process without a network")
def test_code_has_no_network(server):
    port = server.server_port
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n{PASSES}"
    assert not passes_tests(code, TESTS)


@pytest.mark.slow
def test_code_is_scored_by_the_tests_of_its_row():
    answers = [f"Here it is:\n```python\n{PASSES}\n```\nDone.", "def add(a, b): return 0"]
    reward = load_reward("code")
    assert reward(prompts=["?"] * 2, completions=answers, tests=[TESTS, [TESTS, "assert add(0, 0) == 0"]]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "code"), [("x = 1", "x = 1"), ("```\na\n```\n```py\nb\n```", "b\n"), ("```python\nopen", "open")]
)
def test_code_is_the_last_block_of_an_answer(text, code):
    assert find_code(text) == code


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("command:", "missing"),
        ("command:no-such-program x", "no-such-program"),
        ("command:'", "no command"),
        ("http://", "no server"),
        ("reasoning-gym:no_such_task", "reasoning-gym"),
    ],
)
def test_bad_spec_is_refused(spec, problem):
    assert problem in find_reward_error(spec).problem


def test_file_beside_the_recipe_is_found(tmp_path):
    for name in ("rewards.py", "schema.json", "judge"):
        (tmp_path / name).touch()
    specs = ["rewards.py:f", "json-schema:schema.json", "command:judge --strict", "command:python x.py:f", "length:9"]
    assert [make_reward_path_absolute(spec, tmp_path) for spec in specs] == [
        f"{tmp_path}/rewards.py:f",
        f"json-schema:{tmp_path}/schema.json",
        f"command:{tmp_path}/judge --strict",
        *specs[3:],
    ]


def test_command_may_end_with_a_file_of_python():
    assert find_reward_error(f"command:{sys.executable} judge.py") is None


def test_name_of_a_server_has_no_password():
    assert make_short_reward_name("http://user:secret@judge:80/x") == "judge:80"


@pytest.mark.slow
def test_tasks_of_reasoning_gym_score_their_own_rows(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the extra reasoning-gym")
    for task in ("chain_sum", "letter_counting", "spell_backward", "countdown"):
        rows = [json.loads(json.dumps(row)) for row in make_rows(task, 3, 0, {})]
        columns = {name: [row[name] for row in rows] for name in ("answer", "metadata")}
        prompts = [row["prompt"] for row in rows]
        right = [f"I think <answer>{row['answer']}</answer>" for row in rows]
        if task != "countdown":  # its answers are examples of expressions
            assert load_reward(f"reasoning-gym:{task}")(prompts=prompts, completions=right, **columns) == [1, 1, 1]
        wrong = load_reward(f"reasoning-gym:{task}")(prompts=prompts, completions=["?"] * 3, **columns)
        assert max(wrong) < 0.1
    assert "'chain_sum'" in find_reward_error("reasoning-gym:chain_sums").problem
