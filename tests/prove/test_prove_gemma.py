"""The README's commands on Gemma 3 270M: a scaled and tied embedding of 262,144 tokens, sliding windows, a GGUF that
brings no chat template.

What `make slow` runs needs no engine but torch; `make prove` adds merging, exports, the server, DPO and a comparison.
"""

import json
import threading
import urllib.request

import pytest
from gemma_base import join_gemma_gguf
from row_files import write_jsonl

from slimtune.export import expected_logps
from slimtune.serving.model_server import ModelServer, ServeSettings

pytestmark = pytest.mark.real
prove, slow = pytest.mark.prove, pytest.mark.slow
WORDS = "Hope: a polite lie that is told at noon.", "Envy: the praise of the unable.", "Debt: a whip made of paper."
GENERAL = "A river carries sand to the sea, and the sea gives none of it back. " * 8


SAID = [word.split(": ") for word in WORDS * 5]


def write_chats(file, numbers):
    def make_chat(number, name, text):
        asked = {"role": "user", "content": f"{number}. Define {name}."}
        return {"messages": [asked, {"role": "assistant", "content": text}]}

    write_jsonl(file, (make_chat(number, *SAID[number]) for number in numbers))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "gemma.gguf").symlink_to(join_gemma_gguf())
    write_chats(folder / "chats.jsonl", range(12))
    write_chats(folder / "held_out.jsonl", range(12, 15))
    texts = [{"prompt": f"{i}. {name}: ", "completion": text} for i, (name, text) in enumerate(SAID)]
    write_jsonl(folder / "completions.jsonl", texts[:12])
    write_jsonl(folder / "completions_held_out.jsonl", texts[12:])
    pairs = [{"prompt": f"{i}. {n}?", "chosen": t, "rejected": "I do not know."} for i, (n, t) in enumerate(SAID)]
    write_jsonl(folder / "pairs.jsonl", pairs[:6])
    write_jsonl(folder / "pairs_held_out.jsonl", pairs[12:])
    (folder / "general.txt").write_text(GENERAL)
    return folder


@pytest.fixture(scope="module")
def few_positions():
    """Engines are compared on fewer next tokens: llama.cpp computes 262,144 values for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_logps, "MAX_POSITIONS", 40)
        patch.setattr(expected_logps, "MAX_ANSWERS", 1)
        yield


@pytest.fixture(scope="module")
def train(home, slimtune_json):
    def start(name, rows, *flags):
        more = ("--batch-size", 4, "--max-steps", 4, "--lr", "1e-3", *flags)
        return slimtune_json(
            "train", "--model", home / "gemma.gguf", "--data", home / rows, "--out", home / name, *more
        )

    return start


@pytest.fixture(scope="module")
def run(home, train):
    result = train("chat", "chats.jsonl", "--validation", home / "held_out.jsonl")
    assert result["steps"] == 4
    return home / "chat"


@slow
def test_data(home, slimtune_json):
    report = slimtune_json("data", home / "chats.jsonl", "--model", home / "gemma.gguf", "--show", 1)
    (sample,) = report["samples"]
    prompt = "<bos><start_of_turn>user\n0. Define Hope.<end_of_turn>\n<start_of_turn>model\n"
    assert "".join(p["text"] for p in sample["pieces"] if not p["supervised"]).startswith(prompt)
    learned = "".join(p["text"] for p in sample["pieces"] if p["supervised"])
    assert learned == f"{SAID[0][1]}<end_of_turn>"


@slow
def test_train_eval_and_generate(run, home, slimtune):
    held_out = ("--data", home / "held_out.jsonl", "--general-text", home / "general.txt")
    result = json.loads(slimtune("eval", run, *held_out, "--json").stdout)
    assert result["loss_reduction"] > 0.3
    answer = json.loads(slimtune("generate", run, "Define Hope.", "--max-new-tokens", 8, "--json").stdout)
    assert answer["tuned"]


@slow
def test_completions_need_no_chat(home, train, slimtune):
    train("completions", "completions.jsonl")
    held_out = ("--data", home / "completions_held_out.jsonl", "--general-text", "none")
    result = json.loads(slimtune("eval", home / "completions", *held_out, "--json").stdout)
    assert result["loss_reduction"] > 0


@prove
def test_chat(run, slimtune):
    done = slimtune("chat", run, "--max-new-tokens", 8, stdin="Define Hope.\n/exit\n")
    assert done.exit_code == 0
    assert done.stdout.strip()


@prove
def test_merge(run, home, few_positions, slimtune_json):
    result = slimtune_json("merge", run, "--out", home / "merged")
    assert (home / "merged" / "chat_template.jinja").is_file()
    assert result["effect"] > 0.1
    assert result["strength"] == pytest.approx(1, abs=0.1)


@prove
@pytest.mark.parametrize("target", ["gguf", "vllm"])
def test_export(run, home, target, few_positions, slimtune_json):
    check = slimtune_json("export", run, "--to", target, "--out", home / target)["check"]
    assert check["passed"]
    assert check["effect"] > 0.1
    assert check["strength"] == pytest.approx(1, abs=0.02)


@prove
def test_server(run):
    server = ModelServer([str(run)], ServeSettings(port=0, max_length=256))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        said = {"model": "chat", "max_tokens": 8, "messages": [{"role": "user", "content": "Define Hope."}]}
        request = urllib.request.Request(
            f"{server.url}/chat/completions",
            json.dumps(said).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.loads(answer.read())["choices"][0]["message"]["content"]
    finally:
        server.stop()
        thread.join(timeout=30)


@prove
def test_preferences(home, train, slimtune):
    train("dpo", "pairs.jsonl", "--task", "dpo")
    held_out = ("--data", home / "pairs_held_out.jsonl", "--general-text", "none")
    result = json.loads(slimtune("eval", home / "dpo", *held_out, "--json").stdout)
    assert result["preference"]["pairs"] == 3


@prove
def test_compare(run, home, slimtune_json):
    rows = ("--set", f"data.test={home / 'held_out.jsonl'}", "--set", "data.validation=null")
    size = ("--methods", "lora,ia3", "--seeds", 1, "--tokens", 400)
    table = slimtune_json("compare", run / "recipe.yaml", *size, *rows, "--out", home / "table")
    assert {method["method"] for method in table["methods"]} == {"lora", "ia3"}
