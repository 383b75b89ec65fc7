"""`slimtune explain`: the pages, and which page a text leads to.

real_errors.jsonl has texts from issue threads, with the thread, in the order of three collections. The pages were
written before the first, and improved after the first and the second. When a collection was new, 33 of its 54, 12 of
its 21 and 13 of its 14 texts were answered by the right page; it was the nearest for 42, 19 and 13.
"""

import json
import re
import runpy
import time
import tomllib
from pathlib import Path

import pytest
import yaml

import slimtune.errors
from slimtune.cli import common
from slimtune.diagnostics.knowledge import infer_error_code, is_answered_and_list_nearest_pages, load_error_pages
from slimtune.errors import AdapterError, DataError, RunError, SlimtuneError, UsageError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "slimtune" / "diagnostics" / "knowledge"
PAGES = load_error_pages()
REAL = [json.loads(line) for line in (Path(__file__).parent / "real_errors.jsonl").read_text().splitlines()]


def test_pages_are_complete():
    assert len(PAGES) >= 40
    for code, page in PAGES.items():
        front = yaml.safe_load((FOLDER / f"{code}.md").read_text().split("---\n")[1])
        assert front == {"title": page.title, "patterns": list(page.patterns)} | (
            {"hints": list(page.hints)} if page.hints else {}
        )
        assert re.findall(r"^## (.+)", page.body, re.MULTILINE) == ["Cause", "Check", "Fix", "Source"], code
        cause, check, fix, source = re.split(r"^## .+\n", page.body, flags=re.MULTILINE)[1:]
        assert len(cause) > 60, code
        assert "```sh" in check, code
        assert "```sh" in fix, code
        assert re.search(r"^- <https://\S+>$", source, re.MULTILINE), code


def test_real_errors_find_their_page():
    answers = {row["source"]: (row["pages"], is_answered_and_list_nearest_pages(row["text"])) for row in REAL}
    wrong = {s: (want, found, pages[:1]) for s, (want, (found, pages)) in answers.items()
             if not found or pages[0].code not in want}  # fmt: skip
    assert wrong == {}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("which GPU should I buy", "slimtune choose"),
        ("How much does it cost to train?", "slimtune cost"),
        ("how many examples do I need", "How many rows do I need? 100 to 500 rows"),
        ("which rank", "Which rank? Rank 16."),
        ("which model should I use", "`slimtune models` lists bases"),
        ("what is lora?", "LoRA: Low-rank adaptation"),
        ("what is an epoch", "Epoch: One pass over all training rows."),
        ("What does overfitting mean?", "Overfitting: Learning the training rows by heart"),
        ("target module", "Target modules: The layers that a method changes"),
    ],
)
def test_questions_about_no_error_name_what_answers_them(question, answer, slimtune):
    done = slimtune("explain", question)
    assert (done.exit_code, answer in done.stdout) == (1, True)
    assert not any(code in done.stdout for code in PAGES)
    assert not re.search(r"\.md|\]\(", done.stdout)  # a link would lead to a file that pip does not install


def test_pages_that_share_a_word_by_chance_are_not_near():
    assert is_answered_and_list_nearest_pages("the model forgot everything") == (False, [])
    assert not is_answered_and_list_nearest_pages("two epochs")[0]  # a fix names epochs


def test_texts_of_the_docs_are_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    names = re.findall(r'_load_sections\("(.+?)"\)', (FOLDER / "guides.py").read_text())
    assert wheel["force-include"] == {f"docs/{name}": f"slimtune/diagnostics/knowledge/docs/{name}" for name in names}


def test_real_errors_are_many_and_name_their_threads():
    assert len(REAL) >= 40
    assert len({row["source"] for row in REAL}) == len({row["text"] for row in REAL}) == len(REAL)
    assert all(re.match(r"https://github\.com/[^/]+/[^/]+/(issues|pull)/\d+$", row["source"]) for row in REAL)
    assert all(set(row["pages"]) <= PAGES.keys() for row in REAL)


@pytest.mark.parametrize(
    ("question", "code"),
    [
        ("ollama slow", "ollama-slow"),
        ("why is Ollama so slow?", "ollama-slow"),
        ("ROCm not detected", "rocm-not-detected"),
        ("my loss is nan", "nan-loss"),
        ("the loss does not fall", "loss-does-not-fall"),
        ("adapter ignored by vLLM", "adapter-ignored"),
        ("shared memory in docker", "shared-memory"),
        ("tokenizer without chat template", "chat-template-missing"),
        ("disk full", "disk-full"),
        ("CUDA-OUT-OF-MEMORY", "cuda-out-of-memory"),
        ("my Ollama model answers nonsense", "template-mismatch"),
        ("my model talks gibberish in ollama", "template-mismatch"),
    ],
)
def test_questions(question, code):
    found, pages = is_answered_and_list_nearest_pages(question)
    assert (found, pages[0].code) == (True, code)


@pytest.mark.parametrize(
    "text",
    [
        "recipe for pancakes", "KeyError: 'surprise'", "IndexError: list index out of range", "qwerty", "?", "*", "```",
        "AttributeError: 'NoneType' object has no attribute 'split'", "fatal: not a git repository",
        "ZeroDivisionError: division by zero", "java.lang.NullPointerException at com.foo.Bar",
        "SyntaxError: invalid syntax", "how do I centre a div",
    ],
)  # fmt: skip
def test_foreign_texts_find_no_page(text):
    assert not is_answered_and_list_nearest_pages(text)[0]


def test_the_last_line_of_a_traceback_counts_most():
    text = "RuntimeError: CUDA out of memory\n\nDuring handling:\n\nOSError: [Errno 28] No space left"
    assert is_answered_and_list_nearest_pages(text)[1][0].code == "disk-full"


@pytest.mark.parametrize("text", ["a" * 10**6, "model " * 10**5, "(a+)+$ * [" * 10**4, "403 huggingface.co " * 10**4])
def test_any_text_is_searched_in_bounded_time(text):
    start = time.perf_counter()
    is_answered_and_list_nearest_pages(text)
    assert time.perf_counter() - start < 10


def all_errors(kind: type) -> list[type]:
    return [kind, *(each for child in kind.__subclasses__() for each in all_errors(child))]


def test_every_error_has_a_page():
    kinds = [kind for kind in all_errors(SlimtuneError) if kind.__module__.startswith("slimtune.")]
    assert len(kinds) >= 9
    assert {kind.code for kind in kinds} <= PAGES.keys()
    for code in re.findall(r'code = "([\w-]+)"', Path(slimtune.errors.__file__).read_text()):
        assert code in PAGES


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("No such option: --epocs"), "wrong-use"),
        (RunError("the disk is full: x could not be written"), "disk-full"),
        (DataError("line 3 is no row", "a row"), "data-error"),
        (AdapterError("adapter.safetensors does not fit this model: 2 keys are missing"), "wrong-base"),
        (common.to_user_error(MemoryError()), "system-memory"),
        (
            SlimtuneError("a bug in slimtune: RuntimeError: CUDA error: device-side assert triggered"),
            "cuda-device-assert",
        ),
        (SlimtuneError("a bug in slimtune: KeyError: 3"), "internal-error"),
    ],
)
def test_an_error_leads_to_the_page_of_its_message(error, code):
    assert infer_error_code(f"{error.message}\n{error.expected}\n{error.hint}", error.code) == code


def test_command(slimtune, slimtune_json):
    done = slimtune("explain", "my", "loss", "is", "nan")
    assert done.exit_code == 0
    assert done.stdout.startswith("nan-loss: The loss is NaN or Inf\nCause\n")
    assert "    slimtune train … --dtype bfloat16" in done.stdout
    text = "Traceback (most recent call last):\nRuntimeError: CUDA error: device-side assert triggered\n"
    assert slimtune("explain", "-", stdin=text).stdout.startswith("cuda-device-assert: ")
    assert slimtune_json("explain", "disk-full")["code"] == "disk-full"
    assert len(slimtune_json("explain")["pages"]) == len(PAGES)


def test_no_match_names_the_nearest(slimtune):
    done = slimtune("explain", "IndexError: list index out of range", "--json")
    result = json.loads(done.stdout)
    assert (done.exit_code, result["code"], len(result["nearest"])) == (1, None, 2)
    assert slimtune("explain", "qwerty").stdout.startswith("no page is about this")
    assert slimtune("explain", "-", stdin=" ").exit_code == 2


def test_the_page_in_the_docs_is_current():
    make_page = runpy.run_path(str(ROOT / "docs" / "internals" / "make_troubleshooting.py"))["make_page"]
    assert (ROOT / "docs" / "troubleshooting.md").read_text() == make_page(), "run make_troubleshooting.py"
