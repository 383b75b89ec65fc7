"""Every bad input, typed as a user types it: one clear message, the right exit code, nothing half-written."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from desk import refused
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("kept_traces")
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


def chat(user: str, assistant: str) -> str:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": turns}) + "\n"


SHORT = ("--max-seq-len", "40", "--on-overlong")
FAULTY_ROWS = {
    "empty": ("", "is empty"),
    "not JSON": (CHAT + "{'messages': 3}\n", "rows.jsonl:2: does not parse as JSON", "{'messages': 3}"),
    "no assistant": (CHAT + '{"messages": [{"role": "user", "content": "hi"}]}\n', "rows.jsonl:2", "no assistant turn"),
    "unknown role": (CHAT.replace("assistant", "asistant"), "rows.jsonl:1", "did you mean 'assistant'?"),
    "no messages": ('{"message": []}\n', "did you mean 'messages' for 'message'?"),
    "nothing to learn": (chat("x" * 90, "y"), "rows.jsonl", "no supervised token"),
    "preference": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "rows of the format preference", "--task dpo"),
    "two formats": ('{"text": "a", "prompt": "b", "completion": "c"}\n', "may be prompt-completion or text"),
    "half a row": ('{"text": "a"}\n{"txt": "a"}\n', "rows.jsonl:2: has no 'text'; did you mean 'txt'?"),
    "a weight between": (CHAT.replace('"ho"', '"ho", "weight": 0.3'), "rows.jsonl:1: messages[1].weight is 0.3"),
}


@pytest.mark.parametrize("name", FAULTY_ROWS)
def test_faulty_rows(desk, name):
    text, *parts = FAULTY_ROWS[name]
    refused(desk.train(*SHORT, "truncate", data=desk.write("rows.jsonl", text)), 1, *parts)
    desk.assert_nothing_written()


FAULTY_SETTINGS = {
    "target": ("--set method.target_modules=[q_prj]", "'q_prj' matches no module", "did you mean 'q_proj'?"),
    "one of two targets": ("--set method.target_modules=[q_proj,nothing]", "'nothing' matches no module"),
    "rank_pattern": ("--set 'method.rank_pattern={o_prj: 4}'", "rank_pattern: 'o_prj' matches no adapted module"),
    "layer": (
        "--set method.target_modules=[q_proj] --set method.layers_to_transform=[0,7]",
        "layers_to_transform: '7' matches no layer",
        "layers 0 to 1",
    ),
    "modules_to_save": ("--set method.modules_to_save=[lm_hed]", "did you mean 'lm_head'?"),
    "rank": ("--set method.r=0", "r", "0", "at least 1"),
    "resume": ("--resume", "no run folder"),
    "train_on": ("--train-on last_asistant", "train_on: got 'last_asistant'"),
}


@pytest.mark.parametrize("name", FAULTY_SETTINGS)
def test_faulty_settings(desk, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    flags, *parts = FAULTY_SETTINGS[name]
    refused(desk.train(*shlex.split(flags)), 2, *parts)
    desk.assert_nothing_written()


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("row.jsonl", ("there is no file", "row.jsonl")),
        ("nobody/nothing-here", ("there is no file 'nobody/nothing-here'", "the connection")),
    ],
)
def test_missing_data(desk, monkeypatch, data, parts):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused(desk.train(data=data), 2, *parts)
    desk.assert_nothing_written()


def test_every_fault_of_a_recipe_at_once(desk):
    recipe = desk.write("recipe.yaml", f"model: {desk.base}\ndata: {desk.rows}\ntrain: {{epoch: 3, lerning_rate: 1}}\n"
                        f"method: {{name: lora}}\noutput_dir: {desk.out}\n")  # fmt: skip
    parts = ("did you mean 'epochs'?", "did you mean 'learning_rate'?")
    refused(desk.run("train", recipe), 2, *parts)
    refused(desk.train("--set", "method.rnk=3"), 2, "did you mean 'rank'?")
    refused(desk.run("train", "--epochs", "2"), 2, "--model", "--data", "--out")
    refused(desk.run("train", str(desk.folder / "recipes.yaml")), 2, "did you mean 'recipe.yaml'?")
    desk.assert_nothing_written()


def test_model_without_chat_template_gets_a_built_in_one(desk, caplog):
    (desk.base / "chat_template.jinja").unlink()
    desk.train()
    assert "chatml" in caplog.text
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template = f"data.chat_template={desk.write('t.jinja', text)}"
    assert desk.train("--set", template, out=str(desk.folder / "again")).exit_code == 0


def test_overlong_rows(desk):
    data = desk.write("rows.jsonl", CHAT + chat("x", "y" * 200))
    refused(desk.train(*SHORT, "error", data=data), 1, "40", "rows.jsonl", "2")
    desk.assert_nothing_written()
    dropped = desk.train(*SHORT, "drop", data=data).stderr
    assert "1 of 2 rows" in dropped
    assert "dropped" in dropped
    shutil.rmtree(desk.out)
    assert "1 truncated" in desk.train(*SHORT, "truncate", data=data).stderr


@pytest.fixture
def trained(desk):
    assert desk.train().exit_code == 0
    return desk


def test_adapter_for_another_base(trained, tmp_path, tiny_tokenizer):
    other = tmp_path / "other"
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    adapter, out = str(trained.out / "adapter"), str(tmp_path / "next")
    refused(trained.train("--init-adapter", adapter, model=str(other), out=out), 1, "another base", "fingerprint")
    assert not Path(out).exists()


def test_output_folder_with_another_run(trained):
    before = {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()}
    refused(trained.train(), 2, "already contains another run", "--resume", "--out")
    assert {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()} == before
    refused(trained.run("eval", str(trained.out.with_name("rnu"))), 2, "no run folder", "did you mean 'run'?")


def test_pickled_or_damaged_adapter(trained, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(trained.out / "adapter", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(trained.train("--init-adapter", str(pickled), out=str(tmp_path / "next")), 1, "is a pickle", "safetensors")
    refused(trained.run("generate", str(pickled), "hi"), 1, "is a pickle")
    weights = trained.out / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(trained.run("generate", str(trained.out), "hi"), 1, "adapter_model.safetensors", "incomplete metadata")


def test_resume_from_another_folder(trained, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for args in ((str(trained.out / "recipe.yaml"),), ("--out", str(trained.out))):
        done = trained.run("train", *args, "--resume")
        assert done.exit_code == 0, done.stderr
        assert list((tmp_path / "elsewhere").iterdir()) == []
