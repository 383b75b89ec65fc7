"""What the pages show of a command in each state, and what they send to it."""

import errno
import json
import os
import re
import shutil

import pytest
from waiting import wait_until

from slimtune.core.config.objective_registry import list_objectives
from slimtune.ui import column_choices, form_fields, workspace
from slimtune.ui import command_jobs as jobs
from slimtune.ui.base_choices import list_base_choices
from slimtune.ui.field_help import FIELD_HELP, OBJECTIVE_HELP
from slimtune.ui.field_names import list_page_fields, name_page_fields
from slimtune.ui.markdown import render_markdown

FORM = {"model.name": "smollm2-135m", "data.train": "rows.jsonl"}
REPORT = {
    "file": "rows.jsonl", "format": "chat", "rows": 3, "verdict": "warnings", "max_seq_len": 64, "samples": [
        {"line": 1, "pieces": [{"text": "<b>hello</b>", "supervised": True}]}],
    "issues": [{"severity": "warning", "what": "<i>odd</i>", "count": 2, "lines": [1, 2], "hint": "look"}],
}  # fmt: skip
PLAN = {
    "verdict": "does not fit", "model": "m", "method": "lora", "card": "rtx-3060", "reason": "it needs 30 GiB",
    "advice": [{"change": "--quantization nf4", "saves": 1 << 30, "verdict": "fits"}], "notes": [], "cost": None,
    "need_bytes": {"low": 1 << 34, "high": 1 << 35}, "usable_bytes": {"low": 1 << 33, "high": 1 << 33},
    "tokens_per_second": {"low": 10, "high": 20}, "parts": {"weights": 1 << 34}, "trainable_params": 10,
    "trainable_fraction": 0.1, "total_params": 100, "adapter_bytes": 5, "max_seq_len": 0, "batch": 1, "evidence": {},
}  # fmt: skip


def test_rows_are_checked_by_the_command(browser, pages, commands, finish):
    commands(REPORT)
    form = {**FORM, "column.instruction": "q", "column.output": "a, b=c", "column.input": "", "data.max_seq_len": "64"}
    assert browser.post("/rows", data=form).headers["location"] == "/#job"
    assert finish("data").args == [
        "data", "rows.jsonl", "--model=smollm2-135m", "--max-seq-len=64", "--column=instruction=q",
        "--column=output=a, b=c",
    ]  # fmt: skip
    text = browser.get("/").text
    assert "&lt;b&gt;hello&lt;/b&gt;" in text
    assert "&lt;i&gt;odd&lt;/i&gt;" in text
    assert "<b>hello" not in text
    assert 'href="/plan">Next' in text


def test_fields_of_a_run_are_chosen_or_typed_as_their_types_say(browser):
    text = browser.get("/plan").text
    for path, tag in {"method.name": "select", "model.quantization": "select", "train.learning_rate": "input"}.items():
        assert f'<{tag} id="f-{path}"' in text


def read_field(text, path):
    """Return the attributes of a field, and what is said to be wrong with it."""
    tag = re.search(rf'<(?:input|select) id="f-{path}"[^>]*>', text)[0]
    wrong = re.search(rf'id="e-{path}"[^>]*>([^<]*)<', text)[1]
    return dict(re.findall(r'([\w-]+)="([^"]*)"', tag)), wrong


def test_an_empty_field_names_its_default(browser):
    defaults = {
        "train.learning_rate": "automatic",
        "train.epochs": "3",
        "train.max_steps": "as many as the epochs have",
    }
    text = browser.get("/plan").text
    assert {path: read_field(text, path)[0]["placeholder"] for path in defaults} == defaults


def test_the_automatic_learning_rate_is_shown_once_it_is_planned(browser, commands, finish):
    commands({**PLAN, "learning_rate": 0.0009})
    browser.post("/rows", data=FORM)
    finish("data")
    browser.post("/plan", data={"method.name": "lora"})
    finish("plan")
    assert read_field(browser.get("/plan").text, "train.learning_rate")[0]["placeholder"] == "automatic (0.0009)"
    browser.post("/rows", data={**FORM, "data.max_seq_len": "64"})  # another run than the one that was planned
    assert read_field(browser.get("/plan").text, "train.learning_rate")[0]["placeholder"] == "automatic"


@pytest.mark.parametrize(
    ("path", "text", "is_wrong"),
    [("train.batch_size", "ten", True), ("train.batch_size", "0", True), ("train.batch_size", "4", False),
     ("train.batch_size", "", False), ("train.learning_rate", "1e-3", False), ("train.learning_rate", "auto", False),
     ("train.learning_rate", "-1", True), ("train.learning_rate", ".inf", True), ("train.epochs", "{[", True),
     ("train.epochs", "[" * 5000, True), ("model.quantization", "nf5", True), ("no.such.field", "x", False)],
)  # fmt: skip
def test_a_field_is_checked_as_it_is_typed(browser, path, text, is_wrong):
    answer = browser.get(f"/check/{path}", params={path: text})
    assert answer.status_code == 200
    assert bool(answer.text) == is_wrong


def test_a_wrong_field_starts_no_command_and_says_so_itself(browser, pages, finish):
    browser.post("/rows", data=FORM)
    finish("data")
    answer = browser.post("/plan", data={"train.batch_size": "<b>ten</b>", "train.epochs": "2"})
    assert answer.status_code == 400
    assert pages.jobs.get("plan") is None
    attributes, wrong = read_field(answer.text, "train.batch_size")
    assert attributes["value"] == "&lt;b&gt;ten&lt;/b&gt;"
    assert wrong
    assert read_field(answer.text, "train.epochs")[1] == ""
    assert browser.post("/train", data={"run": "runs/new"}).status_code == 400


def test_rows_that_are_chosen_anew_are_checked_in_place_of_those_before(browser, pages, commands):
    commands(REPORT, seconds=60)
    browser.post("/rows", data=FORM)
    first = pages.jobs.get("data")
    browser.post("/rows", data=FORM)
    assert pages.jobs.get("data") is first
    assert browser.post("/rows", data={**FORM, "column.output": "b"}).headers["location"] == "/#job"
    assert first.ended
    assert "--column=output=b" in pages.jobs.get("data").args


def test_a_running_command_shows_how_far_it_is(browser, pages, commands):
    commands(REPORT, seconds=60)
    browser.post("/rows", data=FORM)
    wait_until(lambda: pages.jobs.get("data").messages)  # its own one
    pages.jobs.get("data").messages.append("general text: 3 of 13 (2 s so far)")
    assert '<progress max="13" value="3"' in browser.get("/").text
    pages.jobs.get("data").messages.append("writes the report")
    assert "<progress aria-label" in browser.get("/").text


def test_one_button_keeps_enough_rows_for_the_evaluation(browser, folder, commands, finish):
    (folder / "rows.jsonl").write_text('{"text": "a"}\n' * 62)
    browser.post("/rows", data=FORM)
    finish("data")
    button = re.search(r'<button form="settings" name="([^"]*)" value="([^"]*)"', browser.get("/plan").text)
    body = f"train.epochs=2&data.test_fraction=&{button[1]}={button[2]}"  # as a browser sends the form and the button
    browser.post("/plan", content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    finish("plan")
    assert {"--set=data.test_fraction=0.1", "--epochs=2"} <= {*finish("plan").args}
    assert 'id="keep-enough"' not in browser.get("/plan").text


def test_what_trains_comes_before_the_form_of_another_run(browser, commands, finish):
    browser.post("/rows", data=FORM)
    finish("data")
    commands(seconds=60)
    browser.post("/train", data={"run": "runs/new"})
    text = browser.get("/train").text
    assert text.index('id="run"') < text.index('id="new-run"')


def test_a_spreadsheet_is_refused_with_the_way_to_a_csv(browser):
    assert "CSV" in re.search(r'class="wrong" role="alert">([^<]*)', browser.post(
        "/upload", files={"file": ("mails.xlsx", b"PK")}).text)[1].partition("choose")[2]  # fmt: skip


def test_a_plan_begins_with_its_verdict(browser, commands, finish):
    commands(PLAN)
    browser.post("/rows", data=FORM)
    finish("data")
    form = {"method.name": "ia3", "train.learning_rate": "1e-3", "more": "method.r=4\n\n", "card": "rtx-3060"}
    assert browser.post("/plan", data=form).headers["location"] == "/plan#job"
    assert finish("plan").args == [
        "plan", "smollm2-135m", "--data=rows.jsonl", "--gpu=rtx-3060", "--method=ia3",
        "--set=train.learning_rate=1e-3", "--set=method.r=4",
    ]  # fmt: skip
    text = browser.get("/plan").text
    shown = [
        text.index(part) for part in ("does not fit</span>", PLAN["reason"], "Quantization: nf4", "Memory of a step")
    ]
    assert shown == sorted(shown)
    assert 'href="/train">Next' not in text


def test_a_part_asks_for_itself_until_its_command_ends(browser, pages, commands, finish):
    commands(REPORT, seconds=30)
    browser.post("/rows", data=FORM)
    assert 'hx-get="/live/data"' in browser.get("/live/data").text
    browser.post("/rows", data=FORM)  # in a second tab
    assert browser.post("/stop/data").headers["location"] == "/#job"
    assert finish("data").state == "stopped"
    text = browser.get("/live/data").text
    assert "hx-get" not in text
    assert "stopped" in text


def test_a_killed_command_says_so(browser, pages, commands, finish):
    commands(REPORT, seconds=30)
    browser.post("/rows", data=FORM)
    pages.jobs.get("data").process.kill()
    finish("data")
    assert "SIGKILL" in browser.get("/").text


def test_an_error_of_a_command_is_shown_in_words(browser, commands, finish):
    commands(
        {
            "error": {
                "message": "<b>no</b> format",
                "expected": "columns",
                "hint": "--format chat",
                "code": "data-error",
            }
        },
        code=1,
    )
    browser.post("/rows", data=FORM)
    assert finish("data").state == "failed"
    text = browser.get("/").text
    assert text.count("&lt;b&gt;no&lt;/b&gt; format") == 1
    assert "Format: chat" in text
    assert '<pre class="log"' not in text  # what the command wrote on stderr, where the error stands, too


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("--lr sets another", "Learning rate sets another"),
        ("--quantization nf4 saves 1 GiB", "Quantization: nf4 saves 1 GiB"),
        ("--max-seq-len 512", "Longest row: 512"),
        ("--max-seq-len=512;", "Longest row: 512;"),
        ("--gradient-checkpointing needs less", "More settings: train.gradient_checkpointing=true needs less"),
        ("--no-packing", "More settings: train.packing=false"),
        ("--set train.seed=3", "More settings: train.seed=3"),
        ("--column 'output=We reply'", "output: We reply"),
        ("name its columns: --column messages=COLUMN", "name its columns: messages: COLUMN"),
        ("train.batch_size: got 'ten'", "Batch size: got 'ten'"),
        ("--no-such-flag x", "--no-such-flag x"),
        ("a -- b, c--d", "a -- b, c--d"),
        ("slimtune eval r --data a.jsonl; --lr 1", "slimtune eval r --data a.jsonl; Learning rate: 1"),
    ],
)
def test_messages_name_fields_of_the_page(said, shown):
    assert name_page_fields(said) == shown


def test_the_way_out_of_a_verdict_is_named_by_fields():
    command = "slimtune train runs/a/recipe.yaml --out runs/a-2 --lr 0.0003 --forgetting-budget 0.05"
    shown = list_page_fields(command)
    assert [text.split()[-1].split("=")[-1] for text in shown] == ["0.0003", "0.05"]
    assert list_page_fields("slimtune eval runs/a --data held_out.jsonl") == []


def test_new_folders_have_free_names(browser, folder):
    for name in ("runs/first", "runs/first-2"):
        (folder / name).mkdir(parents=True)
    assert 'value="runs/first-3"' in browser.get("/train").text
    assert 'value="exports/first"' not in browser.get("/train").text
    answer = browser.post("/train", data={"run": "../x"})
    assert answer.status_code == 400
    assert workspace.WorkspaceFolder(folder).suggest_new("a\0b") == "a\0b"


CSV = "Customer asks,We reply,Agent\n" + "".join(f"Where is {i}?,It is at <b>{i}</b> now,ann\n" for i in range(9))


def read_columns(text):
    """Return the column that is chosen for each role, and the format."""
    selects = re.findall(r'<select id="(?:column-)?(\w+)"(.*?)</select>', text, re.DOTALL)
    chosen = {name: re.search(r"<option[^>]* selected>([^<]*)<", options) for name, options in selects}
    return {name: re.sub(r".*\((.*)\)", r"\1", found[1]) for name, found in chosen.items() if found}


def test_columns_are_guessed_from_the_uploaded_file(browser, finish):
    answer = browser.post("/upload", files={"file": ("shop.csv", CSV)}, data={"model.name": "smollm2-135m"})
    assert 'value="smollm2-135m" list="bases"' in browser.get("/").text
    assert answer.headers["location"] == "/#columns"
    text = browser.get("/").text
    assert "uploads/shop.csv" in text
    assert "9 rows, 3 columns" in text
    assert "It is at &lt;b&gt;0&lt;/b&gt; now" in text
    assert read_columns(text) == {"format": "instruction", "instruction": "Customer asks", "output": "We reply"}
    form = {**FORM, "data.train": "uploads/shop.csv", "column.instruction": "Customer asks", "column.output": "Agent"}
    browser.post("/rows", data=form)
    finish("data")
    assert read_columns(browser.get("/").text)["output"] == "Agent"
    browser.post("/upload", files={"file": ("other.csv", CSV)})
    assert read_columns(browser.get("/").text)["output"] == "We reply"  # the choice was for another file


@pytest.mark.parametrize(
    ("query", "chosen"),
    [
        ({"task.name": "kto"}, {"format": "unpaired-preference", "prompt": "Question", "completion": "Reply"}),
        ({"task.name": "dpo"}, {"format": "preference", "prompt": "Question"}),
        ({"data.format": "prompt-completion"}, {"format": "prompt-completion", "prompt": "Question"}),
        ({"data.format": "no-such"}, {"format": "instruction", "instruction": "Question", "output": "Reply"}),
        ({"column.output": "gone"}, {"output": "Reply"}),
        ({"column.output": "Question"}, {"output": "Question"}),
        ({"column.output": ""}, {}),
    ],
)
def test_the_columns_follow_the_form(browser, folder, query, chosen):
    (folder / "a.csv").write_text("Question,Reply,Thumb\nWhere is it?,Here,up\nWhat is it?,A box,down\n")
    answer = browser.get("/columns", params={"data.train": "a.csv", **query})
    assert answer.status_code == 200
    assert read_columns(answer.text).items() >= chosen.items()


def test_rows_of_another_objective_are_not_read(browser, pages):
    answer = browser.post("/rows", data={**FORM, "task.name": "dpo", "data.format": "chat"})
    assert answer.status_code == 400
    assert pages.jobs.get("data") is None


@pytest.mark.parametrize("rows", ["../secret.csv", "/etc/passwd", "gone.csv", "a\0b", "", "x" * 9000, "org/name"])
def test_columns_of_what_is_not_there(browser, folder, rows):
    (folder.parent / "secret.csv").write_text("secret,word\n1,2\n")
    answer = browser.get("/columns", params={"data.train": rows, "data.format": "[", "column.x": "y"})
    assert answer.status_code == 200
    assert "secret,word" not in answer.text
    assert ">word<" not in answer.text


def test_a_file_that_ends_the_process_that_looks_into_it_is_an_answer(folder, monkeypatch):
    monkeypatch.setattr(column_choices, "PREVIEW_SECONDS", 0.001)
    assert column_choices.run_preview_process(folder / "rows.jsonl").error
    monkeypatch.setattr(column_choices, "PREVIEW_SECONDS", 30)
    assert column_choices.run_preview_process(folder / "rows.jsonl").columns == ["text"]
    monkeypatch.setattr(column_choices.sys, "executable", "/bin/false")
    assert column_choices.run_preview_process(folder / "rows.jsonl").error


def test_what_is_wrong_with_a_field_stands_beside_it(browser, folder):
    answer = browser.post("/rows", data={**FORM, "data.train": "gone.jsonl"})
    assert answer.text.index('class="wrong" role="alert"') > answer.text.index('id="rows"')
    elsewhere = browser.post("/plan", data={}).text  # there is no such field on this page
    assert [len(re.findall('<div class="notice', text)) for text in (answer.text, elsewhere)] == [0, 1]


def test_a_negative_verdict_is_a_result(browser, commands, finish):
    commands({**REPORT, "verdict": "errors"}, code=1)
    browser.post("/rows", data=FORM)
    assert finish("data").state == "negative"
    text = browser.get("/").text
    assert "refuses" in text
    assert 'href="/plan">Next' not in text


@pytest.mark.parametrize("output", ["", "not json", "[1]", '{"a": ' * 2000])
def test_a_command_that_prints_no_result_is_a_failure(browser, commands, finish, output):
    commands(output, code=1)
    browser.post("/rows", data=FORM)
    assert finish("data").state == "failed"
    assert "1: working" in browser.get("/").text


def test_what_a_command_prints_is_bounded(browser, commands, finish, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_OUTPUT", 100)
    commands({"verdict": "ok", "more": "x" * 10000})
    browser.post("/rows", data=FORM)
    assert finish("data").printed == {}


def test_choices_are_kept_for_every_tab_and_the_next_start(browser, folder, finish):
    browser.post("/rows", data=FORM)
    finish("data")
    assert 'value="smollm2-135m"' in browser.get("/").text
    assert workspace.WorkspaceFolder(folder).load_choices()["model.name"] == "smollm2-135m"
    (folder / workspace.STATE_FILE).write_text("{broken")
    assert workspace.WorkspaceFolder(folder).load_choices() == {}


def test_a_full_disk_is_said_and_the_work_goes_on(browser, commands, finish, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    commands(REPORT)
    monkeypatch.setattr(os, "replace", refuse)
    browser.post("/rows", data=FORM)
    assert finish("data").state == "done"
    text = browser.get("/").text
    assert "disk" in text
    assert 'href="/plan">Next' in text
    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    answer = browser.post("/upload", files={"file": ("rows.csv", b"a,b\n")})
    assert answer.status_code == 400
    assert "disk" in answer.text


def test_an_upload_keeps_its_name_and_replaces_nothing(browser, folder):
    for name in ("a b.csv", "../../a b.csv", "C:\\x\\a b.CSV", "<b>.jsonl"):
        assert browser.post("/upload", files={"file": (name, b"1")}).status_code == 303
    found = sorted(f.name for f in (folder / "uploads").iterdir())
    assert found == ["_b_.jsonl", "a b-2.csv", "a b-3.csv", "a b.csv"]
    for name in ("x.exe", "x", "x.jsonl.sh"):
        assert browser.post("/upload", files={"file": (name, b"1")}).status_code == 400
    assert browser.post("/upload", data={"file": "x"}).status_code == 400


def test_rows_and_runs_are_found_without_hidden_files(folder):
    for file in (".hidden/a.jsonl", "deep/b.csv", "runs/one/recipe.yaml", "runs/one/data.json", "note.exe"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({}))
    made = workspace.WorkspaceFolder(folder)
    assert sorted(made.list_rows()) == ["deep/b.csv", "rows.jsonl"]
    assert made.list_runs() == ["runs/one"]


# --- machines and help


def test_machines_are_ranked_for_the_chosen_run(browser, commands, finish):
    offer = {"card": "<b>rtx</b>", "kind": "desktop", "memory_bytes": 1 << 33, "price": None, "cost": None,
             "verdict": "fits", "reason": "249 $"}  # fmt: skip
    commands({"model": "m", "here": None, "buy": [offer], "rent": []})
    browser.post("/rows", data=FORM)
    finish("data")
    browser.post("/machines", data={"budget": "500", "laptop": "yes", "mac": "yes"})
    assert finish("choose").args == [
        "choose", "smollm2-135m", "--data=rows.jsonl", "--budget=500", "--kind=laptop,mac",
    ]  # fmt: skip
    assert "&lt;b&gt;rtx&lt;/b&gt;" in browser.get("/machines").text
    commands({"machines": [offer]})
    browser.post("/machines", data={"compared": "rtx-4090, --help,, rtx 3090"})
    assert finish("gpus").args == ["gpus", "--for=smollm2-135m", "--", "rtx-4090", "--help", "rtx 3090"]
    commands({"processor": "a <i>cpu</i>", "memory": 1 << 33, "rates": {"float32": 1e9}, "skipped": None})
    browser.post("/machines/bench")
    assert finish("bench").args == ["bench"]
    assert "a &lt;i&gt;cpu" in browser.get("/machines").text


def test_a_question_is_looked_up(browser, commands, finish):
    commands({"code": "x", "title": "<b>T</b>", "text": "## Cause\nA <i>b</i>", "nearest": [], "related": ["<u>"]})
    assert browser.post("/help", data={"q": "--why"}).headers["location"] == "/help#job"
    assert finish("explain").args == ["explain", "--", "--why"]
    text = browser.get("/help").text
    assert "<h3>Cause</h3>" in text
    assert not {"<b>T", "<i>b", "<u>"} & {*re.findall(r"<[a-z]>\w?", text)}
    for question in ("", "\0", "x" * 40_000):
        assert browser.post("/help", data={"q": question}).status_code == 303
        finish("explain")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A\n\none\ntwo\n- a\n", "<h3>A</h3>\n<p>one two - a</p>"),
        ("- a `b<`\n- **c**", "<ul><li>a <code>b&lt;</code></li><li><b>c</b></li></ul>"),
        ("```sh\n<x>\n\ny\n```", "<pre>&lt;x&gt;\n\ny</pre>"),
        ("```\nopen", "<pre>open</pre>"),
        ("[a](javascript:alert(1)) <script>", "<p>a) &lt;script&gt;</p>"),
        ('<https://x.org/"y>', '<p><a href="https://x.org/&#34;y" target="_blank" rel="noopener noreferrer">'
         "https://x.org/&#34;y</a></p>"),
        ("| a | b |\n|---|---|", "<pre>| a | b |\n|---|---|</pre>"),
    ],
)  # fmt: skip
def test_help_is_shown_as_escaped_html(text, html):
    assert render_markdown(text) == html


def test_every_field_has_a_label_and_its_help(browser, commands, finish):
    for path in ("/", "/plan", "/train", "/runs", "/machines", "/help"):
        text = browser.get(path).text
        ids = re.findall(r"<(?:input|select|textarea) id=\"([^\"]+)\"", text)
        assert [i for i in ids if f'<label for="{i}">' not in text] == []
        every = re.findall(r"<(?:input|select|textarea) [^>]*", text)
        assert [e for e in every if " id=" not in e and 'type="hidden' not in e and "checkbox" not in e] == []


# --- what a newcomer meets


def test_a_report_on_other_rows_says_so(browser, pages, commands, finish):
    commands({**REPORT, "verdict": "errors"}, code=1)
    browser.post("/rows", data=FORM)
    finish("data")
    assert not pages.job_view("data").is_outdated
    browser.post("/upload", files={"file": ("mended.csv", CSV)})
    assert pages.job_view("data").is_outdated


def test_an_error_about_other_rows_is_not_shown(browser, commands, finish):
    commands({"error": {"message": "there is no base 'smolm2'"}}, code=2)
    browser.post("/rows", data=FORM)
    finish("data")
    assert "smolm2&" in browser.get("/").text
    browser.post("/upload", files={"file": ("mended.csv", CSV)})
    assert "smolm2&" not in browser.get("/").text


def test_a_plan_of_other_settings_says_so_and_leads_to_no_training(browser, commands, finish):
    commands({**PLAN, "verdict": "fits"})
    browser.post("/rows", data=FORM)
    finish("data")
    browser.post("/plan", data={"train.epochs": "2"})
    finish("plan")
    assert 'href="/train">Next' in browser.get("/plan").text
    browser.post("/rows", data={**FORM, "data.max_seq_len": "64"})
    finish("data")
    assert 'href="/train">Next' not in browser.get("/plan").text


def test_bases_on_this_machine_come_first_then_the_smallest(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--Qwen--Qwen3-8B" / "snapshots").mkdir(parents=True)
    here = [base.name for base in list_base_choices() if base.is_here]
    assert "qwen3-8b" in here
    bases = list_base_choices()
    assert [base.is_here for base in bases] == sorted((base.is_here for base in bases), reverse=True)
    others = [base.params for base in bases if not base.is_here]
    assert others == sorted(others)


def test_every_objective_and_field_is_said_in_plain_words():
    assert OBJECTIVE_HELP.keys() == {*list_objectives()}
    fields = {**form_fields.ROWS_FIELDS, **form_fields.RUN_FIELDS}.keys() - {"data.format", "task.name"}
    assert FIELD_HELP.keys() == fields


def test_automatic_may_be_typed(browser, finish):
    browser.post("/rows", data=FORM)
    finish("data")
    browser.post("/plan", data={"train.learning_rate": "Automatic"})
    assert finish("plan").args == ["plan", "smollm2-135m", "--data=rows.jsonl"]


def test_a_decimal_comma_is_named():
    assert "0.0002" in form_fields.find_value_error("train.learning_rate", "0,0002")


def test_the_plan_counts_the_rows_that_are_kept(browser, pages, folder, finish):
    (folder / "rows.csv").write_text(CSV + CSV.partition("\n")[2] * 3)  # 36 rows
    browser.post("/rows", data={**FORM, "data.train": "rows.csv"})
    finish("data")
    for form, kept in (({}, 2), ({"data.test_fraction": "0.2"}, 7), ({"data.validation_fraction": "0"}, None),
                       ({"more": "train.seed=1"}, 2), ({"more": "data.test_fraction=0.2"}, None)):  # fmt: skip
        browser.post("/plan", data=form)
        finish("plan")
        found = pages.count_held_out_rows()
        assert (found and found.kept) == kept


@pytest.mark.parametrize(
    ("field", "text"), [("budget", "cheap"), ("budget", "-5"), ("hours", "1,5"), ("budget", "--x")]
)
def test_a_limit_of_machines_that_is_no_number_is_refused_beside_its_field(browser, pages, field, text):
    browser.post("/rows", data=FORM)
    answer = browser.post("/machines", data={field: text})
    assert answer.status_code == 400
    assert answer.text.index('class="wrong" role="alert"') > answer.text.index(f'id="{field}"')
    assert pages.jobs.get("choose") is None
