"""Every bad input, typed as a user types it: one clear message, the right exit code, nothing half-written.

2: what the user typed. 1: what the work found.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import write_rows
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from slimtune.cli import app

CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


class Desk:
    """A user's folder: a base, rows, and the command line."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.out = base, folder, folder / "run"
        self.rows = write_rows(folder / "rows.jsonl", 8)

    def train(self, *more: str, **instead: str):
        flags = {"model": str(self.base), "data": str(self.rows), "out": str(self.out), "dtype": "float32", **instead}
        steps = [] if {"--epochs", "--resume"} & set(more) else ["--max-steps", "2"]
        return self.run("train", *(x for k, v in flags.items() for x in (f"--{k}", v)), *steps, *more)

    def run(self, *args: str):
        return CliRunner().invoke(app, list(args))

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)


@pytest.fixture
def desk(tiny_folder, tmp_path):
    return Desk(tiny_folder, tmp_path)


def refused(result, code: int, *parts: str) -> None:
    said = " ".join(result.stderr.split())
    assert result.exit_code == code, said
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    for part in parts:
        assert part in said


def nothing_written(desk: Desk) -> None:
    assert not desk.out.exists()
    assert [p for p in desk.folder.rglob("*") if p.name.startswith(".checkpoint") or p.suffix == ".tmp"] == []


FAULTY_ROWS = {
    "empty": ("", "is empty"),
    "not JSON": (CHAT + "{'messages': 3}\n", "rows.jsonl:2: does not parse as JSON", "{'messages': 3}"),
    "no assistant": (CHAT + '{"messages": [{"role": "user", "content": "hi"}]}\n', "rows.jsonl:2", "no assistant turn"),
    "unknown role": (CHAT.replace("assistant", "asistant"), "rows.jsonl:1", "did you mean 'assistant'?"),
    "no messages": ('{"message": []}\n', "did you mean 'messages' for 'message'?"),
}


@pytest.mark.parametrize("name", FAULTY_ROWS)
def test_faulty_rows(desk, name):
    text, *parts = FAULTY_ROWS[name]
    refused(desk.train(data=desk.write("rows.jsonl", text)), 1, *parts)
    nothing_written(desk)


def test_a_missing_file(desk):
    refused(desk.train(data=str(desk.folder / "row.jsonl")), 2, "row.jsonl", "did you mean 'rows.jsonl'?")
    nothing_written(desk)


def test_a_missing_recipe(desk):
    desk.write("recipe.yaml", "")
    refused(desk.run("train", str(desk.folder / "recipes.yaml")), 2, "did you mean 'recipe.yaml'?")


def test_a_model_without_a_chat_template(desk):
    (desk.base / "chat_template.jinja").unlink()
    refused(desk.train(), 1, "chat template", "data.chat_template")
    nothing_written(desk)
    template = desk.write(
        "t.jinja", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert desk.train("--set", f"data.chat_template={template}").exit_code == 0


def test_all_tokens_masked(desk):
    # Cut to the user's part, nothing is left to learn from.
    long = json.dumps({"messages": [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y"}]})
    data = desk.write("rows.jsonl", long + "\n")
    result = desk.train("--max-seq-len", "40", "--on-overlong", "truncate", data=data)
    refused(result, 1, "rows.jsonl", "no supervised token")
    nothing_written(desk)


def test_rows_that_are_too_long(desk):
    long = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 200}]})
    data = desk.write("rows.jsonl", CHAT + long + "\n")
    refused(desk.train("--max-seq-len", "100", "--on-overlong", "error", data=data), 1, "100", "rows.jsonl", "2")
    nothing_written(desk)
    dropped = desk.train("--max-seq-len", "100", data=data)
    assert dropped.exit_code == 0
    assert "1 of 2 rows" in dropped.stderr
    assert "dropped" in dropped.stderr
    shutil.rmtree(desk.out)
    assert "1 truncated" in desk.train("--max-seq-len", "100", "--on-overlong", "truncate", data=data).stderr


def test_unknown_recipe_fields_all_at_once(desk):
    recipe = desk.write("recipe.yaml", f"model: {desk.base}\ndata: {desk.rows}\ntrain: {{epoch: 3, lerning_rate: 1}}\n"
                        f"method: {{name: lora, rnk: 3}}\noutput_dir: {desk.out}\n")  # fmt: skip
    parts = ("did you mean 'epochs'?", "did you mean 'learning_rate'?", "did you mean 'rank'?")
    refused(desk.run("train", recipe), 2, *parts)
    nothing_written(desk)


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["method.target_modules=[q_prj]"], ["'q_prj' matches no module", "did you mean 'q_proj'?", "'v_proj'"]),
        (["method.target_modules=[q_proj, nothing]"], ["'nothing' matches no module"]),
        (["method.rank_pattern={o_prj: 4}"], ["rank_pattern: 'o_prj' matches no adapted module", "'o_proj'"]),
        (["method.alpha_pattern={o_prj: 4}"], ["alpha_pattern: 'o_prj' matches no adapted module"]),
        (
            ["method.target_modules=[q_proj]", "method.layers_to_transform=[0, 7]"],
            ["layers_to_transform: '7' matches no layer", "layers 0 to 1"],
        ),
        (
            ["method.modules_to_save=[lm_hed]"],
            ["modules_to_save: 'lm_hed' matches no module", "did you mean 'lm_head'?"],
        ),
        (["method.r=0"], ["r", "0", "at least 1"]),
    ],
)
def test_what_matches_nothing(desk, sets, parts):
    refused(desk.train(*(x for s in sets for x in ("--set", s))), 2, *parts)
    nothing_written(desk)


@pytest.fixture
def trained(desk):
    assert desk.train().exit_code == 0
    return desk


def test_an_adapter_for_another_base(trained, tmp_path, tiny_tokenizer):
    other = tmp_path / "other"
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    adapter, out = str(trained.out / "adapter"), str(tmp_path / "next")
    refused(trained.train("--init-adapter", adapter, model=str(other), out=out), 1, "another base", "fingerprint")
    assert not Path(out).exists()


def test_an_output_folder_with_another_run(trained):
    before = {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()}
    refused(trained.train(), 2, "already contains another run", "--resume", "--out")
    assert {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()} == before


def test_a_pickled_adapter(trained, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(trained.out / "adapter", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(trained.train("--init-adapter", str(pickled), out=str(tmp_path / "next")), 1, "is a pickle", "safetensors")
    refused(trained.run("generate", str(pickled), "hi"), 1, "is a pickle")


def test_a_damaged_adapter(trained):
    weights = trained.out / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(trained.run("generate", str(trained.out), "hi"), 1, "adapter_model.safetensors", "incomplete metadata")


def test_a_base_that_wants_remote_code(desk):
    config = json.loads((desk.base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (desk.base / "config.json").write_text(json.dumps(config))
    refused(desk.train(), 2, "code of its own", "--trust-remote-code")
    nothing_written(desk)


def test_a_full_disk(desk, monkeypatch):
    from slimtune.training import checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
    refused(desk.train(), 1, "the disk is full", "free")
    assert list((desk.out / "checkpoints").iterdir()) == []
    assert not desk.out.joinpath("adapter").exists()


def test_runs_that_are_not_there(desk):
    (desk.folder / "runs").mkdir()
    refused(desk.run("eval", str(desk.folder / "rnus")), 2, "no run folder", "did you mean 'runs'?")
    refused(desk.train("--resume"), 2, "no run folder")


def test_flags_alone_say_all_that_is_missing(desk):
    refused(desk.run("train", "--epochs", "2"), 2, "--model", "--data", "--out")


def test_json_carries_the_error(desk):
    result = desk.train("--json", data=str(desk.folder / "row.jsonl"))
    assert json.loads(result.stdout)["error"]["exit_code"] == 2
    assert result.stdout.count("\n") == 1


def test_resuming_from_elsewhere_and_by_the_folder_alone(trained, monkeypatch, tmp_path):
    (tmp_path / "unsupported_peft_fields").mkdir()
    monkeypatch.chdir(tmp_path / "unsupported_peft_fields")
    for args in ((str(trained.out / "recipe.yaml"),), ("--out", str(trained.out))):
        done = trained.run("train", *args, "--resume")
        assert done.exit_code == 0, done.stderr
        assert "every step is done already" in done.stderr
