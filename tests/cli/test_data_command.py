"""`slimtune data`: what it prints, its exit codes, its page; and training that runs it first."""

import json

import pytest
from row_files import write_jsonl

pytestmark = pytest.mark.usefixtures("kept_traces")
BROKEN = "So<|im_end|>"


def talk(i, answer=None):
    text = answer or f"The word number {i} means {'very ' * (i % 4)}{i * 37}."
    return {"messages": [{"role": "user", "content": f"Define {i}."}, {"role": "assistant", "content": text}]}


@pytest.fixture
def rows(tmp_path):
    """Return `rows((line, row), …)`: writes 20 sound rows with these lines replaced."""

    def write(*changed, n=20, name="rows.jsonl"):
        made = [talk(i) for i in range(n)]
        for line, row in changed:
            made[line - 1] = row
        return write_jsonl(tmp_path / name, made)

    return write


def test_sound_file(rows, tiny_folder, slimtune):
    done = slimtune("data", rows(), "--model", tiny_folder)
    assert done.exit_code == 0, done.stderr
    assert "20, none invalid" in done.stdout
    assert "<|im_start|>user\nDefine 0.<|im_end|>" in done.stdout
    assert "⟦The word number 0 means 0.<|im_end|>⟧" in done.stdout
    assert done.stdout.endswith("\nnote: 20 rows are few; 100 to 500 are a start for a tone, more for a domain\n\nok\n")


def test_verdict_is_the_exit_code(rows, tiny_folder, slimtune, slimtune_json):
    command = ("data", rows((7, talk(3))), "--model", tiny_folder)
    report = slimtune_json(*command)
    assert report["verdict"] == "warnings"
    assert [(issue["code"], issue["lines"]) for issue in report["issues"]] == [("duplicate", [7])]
    assert slimtune(*command, "--strict").exit_code == 1
    rows((2, talk(2, BROKEN)))
    faulty = slimtune(*command, "--json")
    assert (faulty.exit_code, json.loads(faulty.stdout)["verdict"]) == (1, "errors")
    shown = slimtune(*command).stdout
    assert "error: control-token-in-text: " in shown
    assert "line 2" in shown


def test_overlap_with_validation_and_page(rows, tiny_folder, tmp_path, slimtune):
    held_out = rows((3, talk(70)), (4, talk(5)), n=4, name="held.jsonl")
    train = rows((1, talk(90)), (2, talk(91)), (3, talk(92)))
    command = ("data", train, "--model", tiny_folder, "--validation", held_out, "--json")
    (issue,) = json.loads(slimtune(*command, "--html", tmp_path / "a.html").stdout)["issues"]
    assert (issue["code"], issue["severity"], issue["lines"]) == ("overlap", "error", [6])
    assert "line 6 is line 4" in issue["what"]
    assert "line 6 is line 4" in (tmp_path / "a.html").read_text(encoding="utf-8")
    held_out.write_text(held_out.read_text(encoding="utf-8").replace("number 5 means", "number 5 is") + "{\n")
    assert [i["code"] for i in json.loads(slimtune(*command).stdout)["issues"]] == ["validation-invalid"]


def test_columns_that_are_not_used_are_named_everywhere(rows, tiny_folder, tmp_path, slimtune, slimtune_json):
    path, page, run = rows((1, {**talk(0), "source": "x", "score": 3})), tmp_path / "a.html", tmp_path / "run"
    ignored = ("--ignore-columns", "score")
    report = slimtune_json("data", path, "--model", tiny_folder, "--html", page, *ignored)
    assert (report["columns"], report["ignored_columns"]) == (["messages"], ["score"])
    assert report["unused_columns"] == [{"name": "source", "rows": 1, "changes_meaning": False}]
    named = "messages; not used: source (1 row); left out by --ignore-columns: score"
    assert named in " ".join(slimtune("data", path, *ignored, columns=200).stdout.split())
    assert "source (1)" in page.read_text(encoding="utf-8")
    refused = slimtune(*train_flags(path, tiny_folder, run))
    assert (refused.exit_code, run.exists()) == (1, False)
    assert "--ignore-columns score" in refused.stderr
    assert slimtune(*train_flags(path, tiny_folder, run), *ignored).exit_code == 0
    assert f"columns: {named}" in (run / "train.log").read_text()
    assert "ignore_columns:\n  - score" in (run / "recipe.yaml").read_text()


def test_without_a_base_nothing_is_called_sound(rows, slimtune, slimtune_json):
    report = slimtune_json("data", rows())
    assert (report["rows"], report["tokens"], report["verdict"], report["model"]) == (20, 0, "not checked", None)
    done = slimtune("data", rows((2, {"messages": []})))
    assert done.exit_code == 1
    assert "20, 1 invalid" in done.stdout
    assert slimtune("data", rows(), "--strict").exit_code == 1


def test_validation_rows_with_a_column_that_is_not_used(rows, tiny_folder, slimtune):
    held_out = rows((1, {**talk(50), "label": 1}), n=1, name="held.jsonl")
    done = slimtune("data", rows(), "--model", tiny_folder, "--validation", held_out, columns=300)
    assert done.exit_code == 1
    assert "validation-invalid" in done.stdout
    assert "'label'" in done.stdout


def test_the_verdict_is_last_and_samples_are_short(rows, tiny_folder, slimtune):
    done = slimtune("data", rows((1, talk(1, "word " * 150))), "--model", tiny_folder)
    assert done.stdout.count("word ") < 100
    assert done.stdout.rstrip().splitlines()[-1] == "ok"


USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Hello."), ("assistant", "No."))
)
SHOWN = {
    "chat": ({"messages": [USER, GOOD]}, (), [("", "Hello.<|im_end|>")]),
    "instruction": ({"instruction": "Hi?", "output": "Hello."}, (), [("", "Hello.<|im_end|>")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        (),
        [("", "Hello.<|im_end|>")],
    ),
    "prompt-completion": ({"prompt": "Hi?", "completion": " Hello."}, (), [("", " Hello.<|im_end|>")]),
    "text": ({"text": "Hi? Hello."}, (), [("", "Hi? Hello.<|im_end|>")]),
    "document": ({"text": "Hi? Hello."}, ("--format", "document"), [("", "Hi? Hello.<|im_end|>")]),
    "preference": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [USER, BAD]},
        (),
        [("chosen answer", "Hello.<|im_end|>"), ("rejected answer", "No.<|im_end|>")],
    ),
    "preference of texts": (
        {"prompt": "Hi?", "chosen": " Hello.", "rejected": " No."},
        (),
        [("chosen answer", "Hello.<|im_end|>"), ("rejected answer", "No.<|im_end|>")],
    ),
    "ranked-preference": (
        {"prompt": "Hi?", "responses": [" No.", " Hello.", " Hm."], "rankings": [3, 1, 2]},
        (),
        [("best of 3 answers", "Hello.<|im_end|>"), ("answer 2 of 3", "Hm.<|im_end|>"),
         ("worst of 3 answers", "No.<|im_end|>")],
    ),
    "unpaired-preference": (
        {"prompt": "Hi?", "completion": " Hello.", "label": True},
        ("--format", "unpaired-preference"),
        [("good answer", "Hello.<|im_end|>")],
    ),
    "classification": ({"text": "Hi?", "label": "a"}, ("--format", "classification"), [("label 'a'", None)]),
    "classification of chats": (
        {"messages": [USER], "label": ["a", "b"]}, ("--format", "classification"), [("label 'a', 'b'", None)]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "flags", "texts"), SHOWN.values(), ids=SHOWN)
def test_show_prints_every_text_of_a_row_with_what_is_learned(tmp_path, tiny_folder, slimtune, row, flags, texts):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    for base, end in ((("--model", tiny_folder), "<|im_end|>"), ((), "")):  # without a base, no end of a turn is known
        shown = slimtune("data", path, "--show", "1", *flags, *base).stdout
        for name, learned in texts:
            heading = f"line 1, {name}, as" if name else "line 1, as"
            assert shown.count(heading) == 1
            assert learned is None or f"⟦{learned.removesuffix('<|im_end|>')}{end}⟧" in shown
        assert shown.count("⟦") == sum(learned is not None for _, learned in texts)
        assert "Hi?" in shown
        assert shown.count("line 1, ") == len(texts)


def test_show_takes_any_number_of_rows_and_shows_answers_to_long_prompts(rows, tiny_folder, slimtune):
    long = {"messages": [{"role": "user", "content": "word " * 900}, GOOD]}
    path, base = rows((1, long)), ("--model", tiny_folder)

    def count_shown(*flags):
        return sum(line.startswith("line ") for line in slimtune("data", path, *flags).stdout.splitlines())

    assert "⟦Hello.<|im_end|>⟧" in slimtune("data", path, *base, "--show", "1").stdout
    assert [count_shown(*base, "--show", n) for n in ("0", "5")] == [0, 5]
    assert [count_shown(), count_shown(*base)] == [0, 3]


def test_control_characters_do_not_reach_the_terminal(rows, tiny_folder, tmp_path, slimtune):
    path = rows((1, talk(1, "a\x1b]52;c;eA==\x07b\x9b2J\u202e")), (2, {"messages\x1b[2J": 1}), name="x\x1b[1m.jsonl")
    for args in (("--model", tiny_folder), ("--validation", "no\x1b[2J"), ("--column", "messages=\x1b[2J")):
        done = slimtune("data", path, *args)
        assert not set(done.output) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert "x1b" in done.output


def test_columns(tmp_path, tiny_folder, slimtune, slimtune_json):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"Define {i},It is {i * 31}\n" for i in range(9)), encoding="utf-8")
    columns = ("--column", "instruction=question", "--column", "output=answer")
    report = slimtune_json("data", path, "--model", tiny_folder, *columns)
    assert (report["format"], report["rows"], report["verdict"]) == ("instruction", 9, "ok")
    assert slimtune("data", path, "--model", tiny_folder).exit_code == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-seq-len", "1"), "data.max_seq_len: got 1"),
        (("--batch-size", "0"), "train.batch_size: got 0"),
        (("--column", "messages"), "--column got 'messages'"),
        (("--on-overlong", "cut"), "cut"),
        (("--validation", "none.jsonl"), "no such file"),
    ],
)
def test_wrong_use(rows, tiny_folder, slimtune, args, message):
    done = slimtune("data", rows(), "--model", tiny_folder, *args)
    assert done.exit_code == 2
    assert message in done.stderr


def train_flags(rows, base, out):
    return ("train", "--model", base, "--data", rows, "--max-steps", 1, "--batch-size", 4, "--rank", 2,
            "--dtype", "fp32", "--out", out)  # fmt: skip


def test_training_stops_on_faulty_rows_unless_forced(rows, tiny_folder, tmp_path, slimtune):
    path, run = rows((2, talk(2, BROKEN)), (9, talk(4))), tmp_path / "run"
    stopped = slimtune(*train_flags(path, tiny_folder, run))
    assert stopped.exit_code == 1
    assert "line 2" in stopped.stderr
    assert "--force" in stopped.stderr
    assert not run.exists()
    done = slimtune(*train_flags(path, tiny_folder, run), "--force")
    assert done.exit_code == 0, done.stderr
    recorded = json.loads((run / "data.json").read_text())
    assert recorded["validation"] is None
    assert [i["code"] for i in recorded["train"]["issues"]] == ["control-token-in-text", "duplicate"]
    assert "error: " in (run / "train.log").read_text()
    alone = json.loads(slimtune("data", path, "--model", tiny_folder, "--batch-size", 4, "--json").stdout)
    assert {**alone, "seconds": 0} == {**recorded["train"], "seconds": 0, "file": str(path)}


def test_training_on_sound_rows_says_so(rows, tiny_folder, tmp_path, slimtune):
    held_out = rows(*((i, talk(50 + i)) for i in range(1, 5)), n=4, name="held.jsonl")
    done = slimtune(*train_flags(rows(), tiny_folder, tmp_path / "run"), "--validation", held_out)
    assert done.exit_code == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("train data: ok") == log.count("validation data: ok") == 1
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (recorded["train"]["rows"], recorded["validation"]["rows"]) == (20, 4)


@pytest.mark.parametrize(
    ("format", "row"),
    [("unpaired-preference", {"prompt": "a", "completion": "b", "label": True}),
     ("ranked-preference", {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}),
     ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
     ("classification", {"text": "a", "label": "b"})],
)  # fmt: skip
def test_formats_of_other_tasks(format, row, rows, slimtune):
    data = json.loads(slimtune("data", rows((1, row), n=1), "--format", format, "--json").stdout)
    assert data["format"] == format
    assert data["invalid_count"] == 0


def test_preferences_are_told_by_their_own_words(tmp_path, tiny_folder, slimtune):
    """A pair shows its best answer, KTO's labels are true and false, and nothing is marked where nothing is learned."""

    def show(row, *flags):
        file = write_jsonl(tmp_path / "rows.jsonl", map(row, range(6)))
        return slimtune("data", file, "--model", tiny_folder, *flags).stdout

    pairs = show(lambda i: {"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"})
    assert "⟦yes 0" in pairs
    rated = show(
        lambda i: {"prompt": f"say {i}", "completion": f" yes {i}", "label": i > 1}, "--format", "unpaired-preference"
    )
    assert "true 4 (67 %), false 2 (33 %)" in rated
    texts = show(lambda i: {"text": f"word {i}", "label": "ab"[i % 2]}, "--format", "classification")
    assert ("\nword 0\n" in texts, "⟦" in texts) == (True, False)
