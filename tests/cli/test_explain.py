"""`slimtune explain`: the pages, and which page a text leads to.

real_errors.jsonl has texts from issue threads, with the thread, in the order of three collections. The pages were
written before the first, and improved after the first and the second. When a collection was new, 33 of its 54, 12 of
its 21 and 13 of its 14 texts were answered by the right page; it was the nearest for 42, 19 and 13.

asked_questions.jsonl has 120 questions and errors in many people's words, each with the answers that are right ("none"
if nothing is), written before the search and split by a seed. The search was made with one half. When the other was
looked at, 50 of its 60 had the right answer, 9 none and 1 a wrong one. forum_questions.jsonl has titles of threads:
when it was new, 33 of 60 were answered by the right page, 22 by none and 5 by a wrong one; of a later collection of 52
titles 32, 14 and 6. All of them were then used to add wordings, so the numbers below are no measure of new questions.

issue_texts.jsonl has 311 titles of issues and error texts from them, each with the answers that are right. The pages
and the search were improved with the half "work". Before and after that, 17 and 27 of the 27 errors and 39 and 58 of
the 72 titles of the half "held out" had the right answer (1 and 0, 5 and 2 a wrong one), and 17 and 18 of 19 errors
and 22 and 31 of 38 titles of "fresh" (0 and 0, 3 and 3). These had been read while pages were written. Those of
"blind" were looked up when the search was finished: 17 of 19 errors and 42 of 53 titles, 1 and 3 wrong.

collected_texts.jsonl has 113 error texts and 162 questions from 142 repositories, labelled before anything was run, and
split by the repository. Of "dev" 67 of 89 errors and 65 of 122 questions were right (7 and 10 wrong) when it was new.
"held out" was first looked at when the search was finished: 23 of 24 errors and 35 of 40 questions (0 and 1 wrong).
Five collections were looked up after that, each when the ones before had been used to add wordings and patterns. When
they were new, "fresh" had 32 of 38 errors and 35 of 52 questions right (0 and 3 wrong), "fresh b", about rarer
subjects, 8 of 14 and 8 of 24 (0 and 3 wrong), "fresh c" 19 of 23 and 37 of 46 (2 and 2 wrong), "fresh d" 19 of 20 and
34 of 48 (1 and 6 wrong), and "fresh e" 9 of 11 and 25 of 30 (1 and 1 wrong). The labels of three of the wrong ones of
"fresh c" and "fresh d" were too narrow and are corrected.
"fresh f", titles of issues and sentences from them, had 21 of
22 errors and 29 of 47 questions right (0 and 10 wrong); their labels were written as sentences before the search ran,
and as names of answers after it.
foreign_texts.txt is about other subjects.
"""

import json
import re
import runpy
import time
import tomllib
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import slimtune.errors
from slimtune.cli import common, explain_command
from slimtune.diagnostics.knowledge import ErrorPage, find_answers, infer_error_code, load_error_pages
from slimtune.diagnostics.knowledge.guides import load_docs_sections_by_heading
from slimtune.errors import AdapterError, DataError, RunError, SlimtuneError, UsageError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "slimtune" / "diagnostics" / "knowledge"
PAGES = load_error_pages()


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(__file__).parent / name).read_text().splitlines()]


def name_answer(text: str) -> str:
    found = find_answers(text).found
    return "none" if found is None else found.code if isinstance(found, ErrorPage) else found.answer


REAL = read_lines("real_errors.jsonl")
ENGINES = "Is my adapter applied in vLLM, SGLang, llama.cpp, Ollama, LM Studio or MLX?"


def test_pages_are_complete():
    assert len(PAGES) >= 40
    for code, page in PAGES.items():
        front = yaml.safe_load((FOLDER / f"{code}.md").read_text().split("---\n")[1])
        texts = {"patterns": page.patterns, "hints": page.hints, "asked": page.asked}
        assert front == {"title": page.title, **{key: list(each) for key, each in texts.items() if each}}
        assert re.findall(r"^## (.+)", page.body, re.MULTILINE) == ["Cause", "Check", "Fix", "Source"], code
        cause, check, fix, source = re.split(r"^## .+\n", page.body, flags=re.MULTILINE)[1:]
        assert len(cause) > 60, code
        assert "```sh" in check, code
        assert "```sh" in fix, code
        assert re.search(r"^- <https://\S+>$", source, re.MULTILINE), code


def test_real_errors_find_their_page():
    found = {row["source"]: (row["pages"], name_answer(row["text"])) for row in REAL}
    assert {source: pair for source, pair in found.items() if pair[1] not in pair[0]} == {}


@pytest.mark.parametrize(
    ("rows", "least_right", "most_wrong"),
    [
        ([row for row in read_lines("asked_questions.jsonl") if row["half"] == "work"], 59, 0),
        ([row for row in read_lines("asked_questions.jsonl") if row["half"] == "held out"], 58, 1),
        (read_lines("forum_questions.jsonl"), 57, 1),
    ],
    ids=["work", "held out", "forum"],
)
def test_questions_in_many_words_find_the_right_answer_or_none(rows, least_right, most_wrong):
    answers = [(row["text"], name_answer(row["text"]), row["right"]) for row in rows]
    wrong = [(text, name) for text, name, right in answers if name != "none" and name not in right]
    assert len(rows) == 60
    assert len(wrong) <= most_wrong, wrong
    assert sum(name in right for _, name, right in answers) >= least_right


@pytest.mark.parametrize(
    ("half", "kind", "least_right", "most_wrong"),
    [
        ("work", "error", 27, 0),
        ("work", "question", 53, 0),
        ("held out", "error", 27, 0),
        ("held out", "question", 68, 1),
        ("fresh", "error", 18, 0),
        ("fresh", "question", 35, 1),
        ("blind", "error", 19, 0),
        ("blind", "question", 50, 2),
    ],
)
def test_texts_of_issues_find_the_right_answer_or_none(half, kind, least_right, most_wrong):
    rows = [row for row in read_lines("issue_texts.jsonl") if (row["half"], row["kind"]) == (half, kind)]
    answers = [(row["text"], name_answer(row["text"]), row["right"]) for row in rows]
    wrong = [(text, name) for text, name, right in answers if name != "none" and name not in right]
    assert len(wrong) <= most_wrong, wrong
    assert sum(name in right for _, name, right in answers) >= least_right


@pytest.mark.parametrize(
    ("half", "kind", "least_right", "most_wrong"),
    [
        ("dev", "error", 88, 0),
        ("dev", "question", 116, 1),
        ("held out", "error", 24, 0),
        ("held out", "question", 39, 0),
        ("fresh", "error", 37, 0),
        ("fresh", "question", 51, 0),
        ("fresh b", "error", 13, 0),
        ("fresh b", "question", 21, 1),
        ("fresh c", "error", 22, 0),
        ("fresh c", "question", 44, 0),
        ("fresh d", "error", 20, 0),
        ("fresh d", "question", 45, 2),
        ("fresh e", "error", 11, 0),
        ("fresh e", "question", 29, 0),
        ("fresh f", "error", 22, 0),
        ("fresh f", "question", 46, 1),
    ],
)
def test_collected_texts_find_the_right_answer_or_none(half, kind, least_right, most_wrong):
    rows = [row for row in read_lines("collected_texts.jsonl") if (row["half"], row["kind"]) == (half, kind)]
    answers = [(row["text"], name_answer(row["text"]), row["right"]) for row in rows]
    wrong = [(text, name) for text, name, right in answers if name != "none" and name not in right]
    assert len(wrong) <= most_wrong, wrong
    assert sum(name in right for _, name, right in answers) >= least_right


def test_texts_about_other_subjects_find_nothing():
    texts = (Path(__file__).parent / "foreign_texts.txt").read_text().splitlines()
    assert len([text for text in texts if name_answer(text) != "none"]) <= 1


def test_questions_name_answers_that_exist():
    files = ("asked_questions", "forum_questions", "issue_texts", "collected_texts")
    named = {name for file in files for row in read_lines(f"{file}.jsonl") for name in row["right"]}
    assert named - PAGES.keys() - load_docs_sections_by_heading().keys() - {"none"} == set()


def test_each_heading_of_the_docs_is_answered_by_its_section():
    sections = load_docs_sections_by_heading()
    assert len([heading for heading in sections if ": " in heading]) > 50  # lessons
    assert [heading for heading in sections if name_answer(heading) != heading] == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("which GPU should I buy", "slimtune choose"),
        ("How much does it cost to train?", "slimtune cost"),
        ("how many examples do I need", "How many rows do I need? 100 to 500 rows"),
        ("which rank", "Which rank? Rank 16."),
        ("which model should I use", "`slimtune models` lists bases"),
        ("what is lora?", "LoRA: Low-rank adaptation"),
        ("what is a MoE model", "Mixture of experts: A model whose layers"),
        ("what is Q4_K_M", "Q4_K_M: A GGUF format"),
        ("what is the bandwidth", "Bandwidth: How many bytes"),
        ("what is an epoch", "Epoch: One pass over all training rows."),
        ("What does overfitting mean?", "Overfitting: Learning the training rows by heart"),
        ("target module", "Target modules: The layers that a method changes"),
    ],
)
def test_questions_about_no_error_name_what_answers_them(question, answer, slimtune):
    done = slimtune("explain", question)
    assert (done.exit_code, answer in done.stdout) == (0, True)
    assert not any(code in done.stdout for code in PAGES)
    assert not re.search(r"\.md|\]\(", done.stdout)  # a link would lead to a file that pip does not install


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("three places", "Bottleneck adapters: Three places"),
        ("the loss falls but the answers are bad", "The loss falls, but the answers are bad."),
        ("is 50 rows enough", "Are 50 rows enough?"),
        ("how do I stop a run", "How do I stop a run?"),
        ("The loss falls, but the answers are bad.", "The loss falls, but the answers are bad."),
        ("my tuned model repeats itself", "The model repeats itself."),
        ("slow training on mac", "Training on a Mac is slow."),
        ("JSON output is broken", "Its JSON is broken."),
        ("the model hallucinates", "It makes things up."),
        ("the answer is cut off", "The answers are cut off."),
        ("it always gives the same answer", "It always gives the same answer."),
        ("it forgot more than its budget", "too-much-forgotten"),
        ("my model forgot how to speak german", "too-much-forgotten"),
        ("no pair changed sides in my DPO run", "preferences-unchanged"),
        ("the model forgot everything", "It answers my task and has forgotten the rest."),
        ("how many exampels do I need", "How many rows do I need?"),
        ("How many questions do I need?", "How many rows do I need?"),
        ("how do I add special tokens", "Can I add new tokens to the vocabulary?"),
    ],
)
def test_what_newcomers_ask_has_an_answer(question, name):
    assert name_answer(question) == name


def test_only_related_pages_are_named_beside_an_answer():
    beside = find_answers("my model does not stop talking").near
    assert not {each.code for each in beside if isinstance(each, ErrorPage)} & {"gpu-busy", "repository-not-found"}
    assert find_answers("two epochs").found is None  # a fix names epochs
    assert find_answers("qwerty").near == ()


@pytest.mark.parametrize("code", sorted(PAGES))
def test_addresses_stay_in_one_line_at_80_columns(code):
    screen = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_command, "make_console", lambda: Console(file=screen, width=80, force_terminal=True))
        explain_command._print_answers(find_answers(code))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert all(address in printed for address in re.findall(r"<(https?://\S+)>", PAGES[code].body))
    prose = [line for line in printed.splitlines() if not re.match(r" {4}|.*https?://", line)]
    assert max(map(len, prose)) <= 80


def test_texts_of_the_docs_are_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    names = ("learn", "glossary.md", "quick_answers.md")
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
        ("my loss curve does not fall", "loss-does-not-fall"),
        ("adapter ignored by vLLM", "adapter-ignored"),
        ("shared memory in docker", "shared-memory"),
        ("tokenizer without chat template", "chat-template-missing"),
        ("disk full", "disk-full"),
        ("CUDA-OUT-OF-MEMORY", "cuda-out-of-memory"),
        ("my Ollama model answers nonsense", "template-mismatch"),
        ("my model talks gibberish in ollama", "template-mismatch"),
        ("vllm is slow", "vllm-slow"),
        ("Cannot copy out of meta tensor; no data!", "meta-tensor"),
        ("llama tokenizer has no padding token", "pad-token"),
        ("cannot import name 'PolyConfig' from 'slimtune'; slimtune lacks this method", "peft-name-missing"),
        ("LoraConfig.__init__() got an unexpected keyword argument 'eva_config'", "adapter-newer-peft"),
        ("push_to_hub fails", "hub-upload"),
        ("is my adapter applied in lm studio?", ENGINES),
        ("is the lora applied in sglang", ENGINES),
        ("my fused mlx model behaves like the base", ENGINES),
        ("it is worse in vllm than in the notebook", ENGINES),
    ],
)
def test_questions(question, code):
    assert name_answer(question) == code


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
    assert name_answer(text) == "none"


def test_the_last_line_of_a_traceback_counts_most():
    text = "RuntimeError: CUDA out of memory\n\nDuring handling:\n\nOSError: [Errno 28] No space left"
    assert name_answer(text) == "disk-full"


@pytest.mark.parametrize("text", ["a" * 10**6, "model " * 10**5, "(a+)+$ * [" * 10**4, "403 huggingface.co " * 10**4])
def test_any_text_is_searched_in_bounded_time(text):
    start = time.perf_counter()
    find_answers(text)
    assert time.perf_counter() - start < 10


def test_a_warning_that_can_be_ignored_hides_no_error():
    warning = "`torch_dtype` is deprecated! Use `dtype` instead!"
    codes = [name_answer(text) for text in (warning, f"RuntimeError: CUDA out of memory\n{warning}")]
    assert codes == ["harmless-warning", "cuda-out-of-memory"]


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
    done = slimtune("explain", "AttributeError: 'Cache' object has no attribute 'tokenizer'", "--json")
    result = json.loads(done.stdout)
    assert (done.exit_code, result["code"], [page["code"] for page in result["nearest"]]) == (
        1,
        None,
        ["version-conflict"],
    )
    assert slimtune("explain", "qwerty").stdout.startswith("no page is about this")
    assert slimtune("explain", "-", stdin=" ").exit_code == 2


def test_the_page_in_the_docs_is_current():
    make_page = runpy.run_path(str(ROOT / "docs" / "internals" / "make_troubleshooting.py"))["make_page"]
    assert (ROOT / "docs" / "troubleshooting.md").read_text() == make_page(), "run make_troubleshooting.py"
