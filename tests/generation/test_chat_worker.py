"""The process that holds the model of a chat, as the page talks to it."""

import json
import signal
import subprocess
import sys

import pytest
from run_answers import RunAnswers

SETTINGS = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def worker():
    """Start the process of a run: `read` waits for an event, `ask` sends a request."""
    started = []

    class Worker:
        def __init__(self, run):
            command = [sys.executable, "-m", "slimtune.generation.chat_worker", str(run)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started.append(self.process)

        def send(self, **request):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

        def read(self):
            return json.loads(self.process.stdout.readline())

        def ask(self, text, *models, **settings):
            """Return what each model says, and the problem."""
            self.send(text=text, models=models, settings={**SETTINGS, **settings})
            texts, problem = dict.fromkeys(models, ""), None
            while "end" not in (event := self.read()):
                texts[event["model"]] += event.get("piece", "")
                problem = event.get("problem", problem)
            return texts, problem

    yield Worker
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def process(worker, shared_run):
    """The process of a run, which is ready."""
    process = worker(shared_run)
    assert process.read()["ready"].startswith("tiny-base with the lora adapter in ")
    return process


@pytest.mark.slow
def test_an_answer_of_the_greatest_length_says_that_it_was_cut(process):
    process.send(text="Define hope.", models=["base"], settings={**SETTINGS, "max_new_tokens": 1})
    assert [event.get("cut") for event in iter(process.read, {"end": True})][-1] is True


@pytest.mark.slow
def test_base_and_tuned_answer_at_the_same_time_and_remember(process, shared_run):
    answers = RunAnswers.open(shared_run)
    process.send(system=None)
    messages = {name: [] for name in ("base", "tuned")}
    for text in ("Define hope.", "And a year?"):
        found, problem = process.ask(text, "base", "tuned")
        assert problem is None
        for name, said in messages.items():
            said.append({"role": "user", "content": text})
            assert found[name] == answers.generate(said, tuned=name == "tuned", max_new_tokens=12)
            said.append({"role": "assistant", "content": found[name]})
    process.send(system="Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert process.ask("Hi", "tuned")[0]["tuned"] == answers.generate(asked, max_new_tokens=12)


@pytest.mark.slow
def test_a_problem_and_a_stop_end_one_answer_only(process):
    process.send(system=None)
    assert "512" in process.ask("x" * 600, "base", "tuned")[1]
    process.send(text="Hi", models=["base", "tuned"], settings={**SETTINGS, "max_new_tokens": 470})
    assert process.read()["piece"]
    process.process.send_signal(signal.SIGINT)
    events = []
    while "end" not in (events[-1:] or [{}])[0]:
        events.append(process.read())
    assert {"model": "base", "problem": "stopped"} in events
    assert process.ask("Hi", "tuned")[1] is None


@pytest.mark.slow
def test_a_run_that_cannot_be_loaded_is_told(tmp_path, worker):
    process = worker(tmp_path / "none")
    assert "none" in process.read()["error"]["message"]
    assert process.process.wait(30) == 2
