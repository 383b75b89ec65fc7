"""What the pages show and do of runs, from the files of their folders: training, evaluation, chat, export."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime

import pytest
from full_run import make_full_run
from waiting import wait_until

from slimtune.core.config import Recipe
from slimtune.core.foundation.files import write_json
from slimtune.errors import UsageError
from slimtune.evaluation.run_results import RunResults
from slimtune.extras.row_files import read_rows
from slimtune.ui.run_pages import (
    estimate_seconds_left,
    find_log_warnings,
    find_setting_differences,
    list_set_aside_splits,
    read_last_log_lines,
    read_run_status,
)

BAD = '<script>alert("x")</script>'
FORM = {"model.name": "smollm2-135m", "data.train": "rows.jsonl"}


@pytest.fixture
def run(folder):
    return make_full_run(folder / "runs/first", BAD)


def write_writer(run, process, host=None, started=None):
    now = (started or datetime.now()).astimezone().isoformat(" ", "seconds")
    write_json(run.path / ".writer.json", {"process": process, "host": host or socket.gethostname(), "started": now})


TRAINER = "import sys, time; file = open(sys.argv[1], 'a'); print(flush=True); time.sleep(60)"


def start_trainer(run, *words, locks=True):
    """Start a process that waits, with these words in its command line and a run's lock open."""
    file = run.path / (".lock" if locks else "train.log")
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, file, *words], stdout=subprocess.PIPE)
    trainer.stdout.readline()
    return trainer


# --- training


def test_a_training_is_started_as_the_command_says(browser, pages, commands, finish, folder):
    browser.post("/rows", data=FORM)
    commands({"run": "runs/new"})
    browser.post("/plan", data={"train.learning_rate": "1e-3", "method.name": "ia3", "more": "train.seed=3"})
    answer = browser.post("/train", data={"run": "runs/new", "force": "yes"})
    assert answer.headers["location"] == "/train#run"
    assert finish("train").args == [
        "train", "--model=smollm2-135m", "--data=rows.jsonl", "--out=runs/new", "--method=ia3", "--lr=1e-3",
        "--set=train.seed=3", "--force",
    ]  # fmt: skip
    for name in ("../new", "/tmp/new", "", "-new"):
        assert browser.post("/train", data={"run": name}).status_code == 400


def test_a_training_that_cannot_begin_says_why(browser, commands, finish):
    browser.post("/rows", data=FORM)
    commands({"error": {"message": "rows.jsonl has no rows", "expected": "", "hint": "add some"}}, code=1)
    browser.post("/train", data={"run": "runs/new"})
    finish("train")
    assert "rows.jsonl has no rows" in browser.get("/train").text
    assert "hx-get" not in browser.get("/live/run").text


def test_a_running_training_is_shown_whoever_started_it(browser, run):
    run.result_file.unlink()
    trainer = start_trainer(run, "slimtune", "train")
    write_writer(run, trainer.pid)
    text = browser.get("/train?run=runs/first").text
    assert 'hx-get="/live/run?run=runs/first"' in text
    assert "40 of 40 steps" in text
    assert 'id="stop-run"' in text
    browser.post("/train/stop", data={"run": "runs/first"})
    assert trainer.wait(20) == -signal.SIGINT
    text = browser.get("/live/run?run=runs/first").text
    assert "killed" in text
    assert 'id="resume-run"' in text
    assert "hx-get" not in text


@pytest.mark.parametrize(
    ("metrics", "done", "total", "left"),
    [({"trained_tokens": 100, "tokens_per_second": 10}, 5, 20, 30.0), ({"trained_tokens": 100}, 5, 20, None),
     ({"trained_tokens": 100, "tokens_per_second": 0}, 5, 20, None), ({}, 0, 0, None),
     ({"trained_tokens": "x", "tokens_per_second": 10}, 5, 20, None),
     ({"trained_tokens": 100, "tokens_per_second": 10}, 20, 20, None)],
)  # fmt: skip
def test_the_time_for_the_rest_follows_the_speed_so_far(metrics, done, total, left):
    assert estimate_seconds_left(metrics, done, total) == left


def test_a_process_that_is_no_training_is_never_stopped(browser, run):
    # One is of another program, one of slimtune but in another folder, as a writer file from elsewhere may say.
    for stranger in (start_trainer(run, "somebody-else"), start_trainer(run, "slimtune", locks=False)):
        for started in (None, datetime(2020, 1, 1)):  # of a process of then, whose number was used again
            write_writer(run, stranger.pid, started=started)
            assert browser.post("/train/stop", data={"run": "runs/first"}).status_code == 400
        assert stranger.poll() is None
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_page_started_later_starts_no_second_training(browser, pages, run, folder, is_loading):
    name = "runs/new" if is_loading else "runs/first"
    trainer = start_trainer(run, "slimtune", "train", f"--out={name}")
    if not is_loading:
        write_writer(run, trainer.pid)
        assert browser.post("/train/resume", data={"run": name}).status_code == 400
    browser.post("/rows", data=FORM)
    answer = browser.post("/train", data={"run": name})
    assert answer.status_code == 400
    assert f"process {trainer.pid} trains {name} already" in answer.text
    assert pages.jobs.get("train") is None
    trainer.kill()
    trainer.wait()


def test_stop_ends_the_training_that_has_the_run(browser, pages, commands, run):
    commands(seconds=20)
    own = pages.jobs.start("train", ["train", "--out=runs/first"], subject="runs/first")  # waits for the lock
    trainer = start_trainer(run, "slimtune", "train")
    write_writer(run, trainer.pid)
    browser.post("/train/stop", data={"run": "runs/first"})
    assert trainer.wait(20) == -signal.SIGINT
    assert own.state == "running"
    browser.post("/train/stop", data={"run": "runs/first"})
    own.wait(20)
    assert own.state == "stopped"


@pytest.mark.parametrize(
    ("writer", "result", "state"),
    [("gone", True, "done"), ("gone", False, "killed"), (None, True, "done"), (None, False, "stopped"),
     ("elsewhere", False, "elsewhere"), ("damaged", False, "killed")],
)  # fmt: skip
def test_states_of_a_run(run, writer, result, state):
    if writer == "damaged":
        (run.path / ".writer.json").write_text('{"process": "all"')
    elif writer is not None:
        write_writer(run, 2**22 + 1, host="other" if writer == "elsewhere" else None)
    if not result:
        run.result_file.unlink()
    assert read_run_status(run).state == state


def test_a_stopped_training_is_resumed(browser, run, finish):
    run.result_file.unlink()
    assert "stopped" in browser.get("/train?run=runs/first").text
    browser.post("/train/resume", data={"run": "runs/first"})
    assert finish("train").args == ["train", "--out=runs/first", "--resume"]


def test_an_adapter_that_was_weakened_says_so(browser, run):
    file = run.path / "result.json"
    forgot = {"budget": 0.1, "tokens": 9, "before": 0.377, "strength": 0.589, "change": 0.0987}
    for forgetting, is_said in ((forgot, True), ({**forgot, "strength": 1}, False), (None, False)):
        write_json(file, {**json.loads(file.read_text()), "forgetting": forgetting})
        write_json(file, {**json.loads(file.read_text()), "validation_loss": 1.2345})
        page = browser.get("/train?run=runs/first").text
        assert ("59 %" in page, "1.234" in page) == (is_said, is_said)  # the loss is that of the adapter that is kept
    write_json(file, {**json.loads(file.read_text()), "forgetting": forgot})
    compared = browser.get("/runs", params={"pick": ["runs/first"]}).text
    assert re.search("forgot, nats per token of general text</th><td>0.099</td>", compared)
    assert re.search("adapter was left with</th><td>59 %</td>", compared)


def test_warnings_from_before_a_training_are_folded_beside_what_its_result_says(browser, run):
    run.log_file.write_text("06:00:00 warning: 21 steps are few\n")
    said = '<p class="notice warn">21 steps are few</p>'
    assert said in browser.get("/train?run=runs/first").text
    file = run.path / "result.json"
    forgot = {"budget": 0.1, "tokens": 9, "before": 0.377, "strength": 0.589, "change": 0.0987}
    write_json(file, {**json.loads(file.read_text()), "forgetting": forgot})
    page = browser.get("/train?run=runs/first").text
    between = page[page.index("59 %") : page.index(said)]
    assert between.count("<details") == between.count("</details") + 1


def test_a_log_is_read_from_its_end_and_never_through_a_link(run, folder):
    run.log_file.write_text("".join(f"line {i}\n" for i in range(100_000)))
    lines = read_last_log_lines(run)
    assert lines[-1] == "line 99999"
    assert len(lines) < 2000
    run.log_file.unlink()
    run.log_file.symlink_to("/etc/passwd")
    assert read_last_log_lines(run) == []


def test_a_run_with_a_link_to_the_outside_is_refused(browser, run, pages):
    (run.path / "train.log").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="folder"):
        pages.workspace.open_run("runs/first")
    assert browser.get("/report", params={"run": "runs/first"}).status_code == 404
    assert browser.get("/runs").status_code == 200


# --- all pages


@pytest.mark.parametrize("path", ["/train", "/evaluate", "/chat", "/runs", "/export", "/report", "/live/run"])
def test_text_of_a_run_is_never_markup(browser, run, path):
    for query in ({"run": "runs/first"}, {"pick": ["runs/first"]}, {"run": BAD}):
        answer = browser.get(path, params=query)
        assert answer.status_code in (200, 404)
        assert "<script>alert" not in answer.text


@pytest.mark.parametrize("damage", ["[]", "{", '{"step": "x"}', ""])
@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "plan.json", "eval-test.json", "recipe.yaml"])
def test_a_damaged_file_does_not_take_the_page_away(browser, run, name, damage):
    (run.path / name).write_text(damage + "\n")
    for path in ("/train", "/evaluate", "/export", "/chat"):
        assert browser.get(path, params={"run": "runs/first"}).status_code == 200, path
    assert browser.get("/runs", params={"pick": "runs/first"}).status_code == 200


def test_report_html_is_written_anew_and_sandboxed(browser, run):
    run.report_file.write_text(BAD)  # anybody's
    answer = browser.get("/report", params={"run": "runs/first"})
    assert answer.status_code == 200
    assert "sandbox" in answer.headers["content-security-policy"]
    assert BAD not in answer.text


def test_runs_stand_side_by_side(browser, run, folder):
    other = make_full_run(folder / "runs/second")
    values = json.loads(other.evaluation_file("test").read_text())
    write_json(other.evaluation_file("test"), {**values, "rows": 7})
    text = browser.get("/runs", params={"pick": ["runs/first", "runs/second"]}).text
    assert text.count("notice warn") == 1  # they were measured on different rows
    assert text.count(" checked") == 2


# --- evaluation and export


def test_an_evaluation_shows_the_verdict_of_the_run(browser, run, finish):
    form = {"run": "runs/first", "split": "test", "generate": "3"}
    assert browser.post("/evaluate", data=form).headers["location"] == "/evaluate#job"
    assert finish("eval").args == ["eval", "runs/first", "--split=test", "--generate=3"]
    text = browser.get("/evaluate").text
    assert "passed</span>" in text
    assert "A noise by which fools signal" in text
    assert browser.post("/evaluate", data={**form, "held_out": "/etc/passwd"}).status_code == 400


def test_what_mends_an_evaluation_is_said_once_in_fields_of_the_page(browser, run):
    values = json.loads(run.evaluation_file("test").read_text())
    steps = [{"why": "measure on more rows", "command": "slimtune eval runs/first --data held_out.jsonl"},
             {"why": "train longer", "command": "slimtune train r/recipe.yaml --out runs/b --epochs 6"}]  # fmt: skip
    verdict = {**values["verdict"], "passed": False, "next_steps": steps}
    write_json(run.evaluation_file("test"), {**values, "verdict": verdict})
    text = browser.get("/evaluate?run=runs/first").text
    assert [text.count(step["why"]) for step in steps] == [1, 1]
    assert not any(step["command"] in text for step in steps)


@pytest.mark.parametrize(
    ("passed", "shown"), [(True, "passed</span>"), (False, "do not use this export"), (None, "no engine")]
)
def test_an_export_shows_its_gate(browser, run, commands, finish, passed, shown):
    check = {"engine": "llama.cpp", "passed": passed, "reason": "no engine" if passed is None else "", "positions": 0}
    commands(
        {"out": "exports/x", "files": {"a.gguf": 1024}, "notes": [], "commands": ["llama-cli -m a"], "check": check}
    )
    form = {"run": "runs/first", "target": "gguf --merged", "out": "exports/x", "require_proof": "yes"}
    browser.post("/export", data=form)
    assert finish("export").args == [
        "export",
        "runs/first",
        "--to=gguf",
        "--out=exports/x",
        "--merged",
        "--require-proof",
    ]
    text = browser.get("/live/export").text
    assert shown in text
    assert "llama-cli -m a" in text
    assert 'name="export" value="exports/x"' in text  # what the button that checks it again sends
    for wrong in ({"target": "gguf --out=/x"}, {"out": "../x"}, {"run": "nowhere"}):
        assert browser.post("/export", data={**form, **wrong}).status_code == 400


@pytest.mark.parametrize(
    ("out", "name"), [("for Ollama", "for-ollama"), ("exports/first", "first"), ("Éa b.", "a-b"), ("é", "tuned")]
)
def test_an_export_for_ollama_has_a_name_that_ollama_takes(browser, run, finish, out, name):
    browser.post("/export", data={"run": "runs/first", "target": "ollama", "out": out})
    assert f"--name={name}" in finish("export").args


def test_an_export_is_checked_again(browser, run, folder, commands, finish):
    (folder / "exports/x").mkdir(parents=True)
    (folder / "exports/x/export_manifest.json").write_text("{}")
    assert "<option>exports/x</option>" in browser.get("/export").text
    check = {"engine": "<b>llama.cpp</b>", "passed": False, "reason": BAD, "mean_difference": 0.5}
    commands({"path": "exports/x", "run": "runs/first", "passed": False, "checks": [check]}, code=1)
    browser.post("/export/verify", data={"export": "exports/x"})
    assert finish("verify").args == ["verify", "exports/x"]
    text = browser.get("/export").text
    assert "&lt;b&gt;llama.cpp" in text
    assert "<script>alert" not in text
    for wrong in ("../x", "/etc", "", "gone"):
        assert browser.post("/export/verify", data={"export": wrong}).status_code == 400


def test_a_run_that_was_not_evaluated_is_not_proven(browser, run):
    run.evaluation_file("test").unlink()
    assert "was not evaluated on held-out rows" in browser.get("/export", params={"run": "runs/first"}).text


# --- chat


def test_base_and_tuned_answer_side_by_side(browser, run, pages):
    assert browser.post("/chat/say", data={"text": "hi"}).status_code == 400
    browser.post("/chat/load", data={"run": "runs/first"})
    wait_until(lambda: pages.conversation.state == "ready")
    browser.post("/chat/say", data={"text": f"hello {BAD}"})
    wait_until(lambda: pages.conversation.state == "ready")
    text = browser.get("/chat").text
    assert "&lt;i&gt;base&lt;/i&gt; says hello" in text
    assert "&lt;i&gt;tuned&lt;/i&gt; says hello" in text
    assert "<script>alert" not in text
    assert "data-cut" not in text
    browser.post("/chat/say", data={"text": "at length"})
    wait_until(lambda: pages.conversation.state == "ready")
    assert browser.get("/chat").text.count("data-cut") == 2
    browser.post("/chat/new", data={"system": "Be brief."})
    assert not pages.conversation.turns
    process = pages.conversation.process
    browser.post("/chat/unload")
    assert process.poll() is not None


def test_an_answer_is_stopped_and_bounded(browser, run, pages):
    browser.post("/chat/load", data={"run": "runs/first"})
    wait_until(lambda: pages.conversation.state == "ready")
    for wrong in (
        {"text": " "},
        {"text": "x" * 32_001},
        {"text": "x", "max_new_tokens": "9999"},
        {"text": "x", "seed": "a"},
    ):
        assert browser.post("/chat/say", data=wrong).status_code == 400
    browser.post("/chat/say", data={"text": "slowly"})
    wait_until(lambda: pages.conversation.turns[-1]["base"])
    assert 'hx-get="/live/chat"' in browser.get("/live/chat").text
    assert browser.post("/chat/say", data={"text": "again"}).status_code == 400
    browser.post("/chat/stop")
    wait_until(lambda: pages.conversation.state == "ready")
    assert pages.conversation.turns[-1]["problem"] == "stopped"


def test_a_rated_answer_is_a_row_that_kto_reads(browser, run, pages, folder):
    browser.post("/chat/load", data={"run": "runs/first"})
    wait_until(lambda: pages.conversation.state == "ready")
    browser.post("/chat/new", data={"system": "Be brief."})
    for text in ("one", f"two {BAD}"):
        browser.post("/chat/say", data={"text": text})
        wait_until(lambda: pages.conversation.state == "ready")
    first, second = (turn["number"] for turn in pages.conversation.turns)
    for number, model, thumb in ((first, "tuned", "down"), (second, "base", "up"), (first, "tuned", "up")):
        answer = browser.post("/chat/rate", data={"number": number, "model": model, "thumb": thumb})
        assert answer.status_code == 303
    rows = read_rows(folder / "ratings/runs-first.jsonl", format="unpaired-preference")
    assert [(len(row.messages), row.is_good) for row in rows] == [(5, True), (3, True)]  # rated anew: at the end
    text = browser.get("/chat").text
    assert text.count('aria-pressed="true"') == 2
    assert "<script>alert" not in text
    assert browser.post("/chat/learn").headers["location"] == "/#columns"
    assert pages.choices.items() >= {"data.train": "ratings/runs-first.jsonl", "task.name": "kto"}.items()


def test_only_complete_answers_are_rated_and_inside_the_folder(browser, run, pages, folder):
    form = {"number": "1", "model": "tuned", "thumb": "up"}
    assert browser.post("/chat/rate", data=form).status_code == 400
    browser.post("/chat/load", data={"run": "runs/first"})
    wait_until(lambda: pages.conversation.state == "ready")
    browser.post("/chat/say", data={"text": "slowly"})
    wait_until(lambda: pages.conversation.turns[-1]["base"])
    assert browser.post("/chat/rate", data={**form, "model": "base"}).status_code == 400
    browser.post("/chat/stop")
    wait_until(lambda: pages.conversation.state == "ready")
    for wrong in ({}, {"number": "7"}, {"model": "user"}, {"model": "__class__"}, {"thumb": "left"}):
        assert browser.post("/chat/rate", data={**form, **wrong}).status_code == 400
    browser.post("/chat/new", data={})
    browser.post("/chat/say", data={"text": "quick"})
    wait_until(lambda: pages.conversation.state == "ready")
    number = pages.conversation.turns[-1]["number"]
    pages.conversation.turns[-1]["tuned"] = "\u200b"  # nothing to be seen, which no row may be
    assert browser.post("/chat/rate", data={**form, "number": number}).status_code == 400
    pages.conversation.turns[-1]["tuned"] = "an answer"
    (folder / "ratings").symlink_to(folder.parent)
    assert browser.post("/chat/rate", data={**form, "number": number}).status_code == 400
    assert not [*folder.parent.glob("*.jsonl")]


@pytest.mark.parametrize("state", ["loading", "ready"])
def test_a_model_that_dies_says_so(browser, run, pages, folder, state):
    browser.post("/chat/load", data={"run": "runs/first"})
    if state == "ready":
        wait_until(lambda: pages.conversation.state == "ready")
    os.kill(pages.conversation.process.pid, signal.SIGKILL)
    wait_until(lambda: pages.conversation.state == "ended")
    assert "SIGKILL" in browser.get("/chat").text
    make_full_run(folder / "runs/broken")
    browser.post("/chat/load", data={"run": "runs/broken"})
    wait_until(lambda: pages.conversation.state == "ended")
    assert "no &lt;b&gt;weights&lt;/b&gt;" in browser.get("/live/chat").text


# --- classifiers and reward models


def test_a_classifier_predicts_where_others_chat(browser, run, pages, commands, finish):
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("name: sft", "name: classification"))
    shares = {"ham": 0.1, "<i>spam</i>": 0.9}
    commands({"run": "runs/first", "text": "-<b>hi</b>", "predicted": "<i>spam</i>", "probabilities": shares})
    browser.post("/chat/load", data={"run": "runs/first"})
    assert pages.conversation is None
    form = {"run": "runs/first", "text": "-<b>hi</b>"}
    assert browser.post("/chat/predict", data=form).headers["location"] == "/chat#job"
    assert finish("predict").args == ["predict", "runs/first", "--", "-<b>hi</b>"]
    text = browser.get("/chat").text
    assert "90.0 %" in text
    assert "<b>hi" not in text
    assert "<i>spam" not in text
    for wrong in ("", "x\0", "x" * 32_001):
        assert browser.post("/chat/predict", data={**form, "text": wrong}).status_code == 400
    assert 'value="merge"' in (export := browser.get("/export", params={"run": "runs/first"}).text)
    assert 'value="ollama"' not in export
    browser.post("/evaluate", data={"run": "runs/first", "split": "test", "generate": "2"})
    assert finish("eval").args == ["eval", "runs/first", "--split=test"]  # no answers, which it does not write


# --- what a newcomer meets


def test_what_the_log_warns_of_is_shown_once():
    lines = ["10:00:00 warning: few rows", "10:00:01 rows: 3", "10:00:02 warning: few rows", "10:00:03 warning: x"]
    assert find_log_warnings(lines) == ["few rows", "x"]


def test_a_resumed_run_loads_until_its_next_step(pages, commands, run):
    commands(seconds=20)
    own = pages.jobs.start("train", ["train", "--out=runs/first", "--resume"], subject="runs/first")
    assert pages.run_view("runs/first").is_loading
    os.utime(run.metrics_file, (own.started + 1, own.started + 1))
    assert not pages.run_view("runs/first").is_loading
    own.stop()
    assert pages.run_view("runs/first").stop_requested
    own.wait(20)


def test_a_training_of_another_page_that_was_told_to_stop_says_so(browser, pages, run):
    run.result_file.unlink()
    trainer = start_trainer(run, "slimtune", "train")
    write_writer(run, trainer.pid)
    assert not pages.run_view("runs/first").stop_requested
    pages.interrupted_processes.add(trainer.pid)
    assert pages.run_view("runs/first").stop_requested
    trainer.kill()
    trainer.wait()


@pytest.mark.parametrize(
    ("settings", "splits"),
    [({}, ["validation"]), ({"test_fraction": 0.2}, ["test", "validation"]), ({"validation_fraction": 0.0}, [])],
)
def test_only_rows_that_were_kept_can_be_chosen(settings, splits):
    recipe = Recipe.from_dict(
        {"output_dir": "runs/a", "model": {"name": "m"}, "data": {"train": "rows.jsonl", **settings}}
    )
    assert list_set_aside_splits(RunResults(recipe=recipe)) == splits


def test_settings_that_differ_stand_side_by_side():
    def results(**train):
        tree = {"output_dir": "r", "model": {"name": "m"}, "data": {"train": "a.csv"}, "train": train}
        return RunResults(recipe=Recipe.from_dict(tree))

    assert find_setting_differences([results(), results()]) == {}
    found = find_setting_differences([results(max_steps=6), results(epochs=2.0)])
    assert found == {"train.epochs": ["3.0", "2.0"], "train.max_steps": ["6", "–"]}
