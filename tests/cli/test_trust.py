"""The code of a base runs only if the user says so on the command line; a file that says so does not count."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_run import write_rows

from slimtune import load_run
from slimtune.errors import UsageError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path("{mark}").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
COMMANDS = [
    "generate RUN hi", "chat RUN", "eval RUN --data ROWS", "merge RUN --out o", "export RUN --to vllm --out o",
    "verify RUN", "push RUN me/name --dry-run", "plan RUN/recipe.yaml", "gpus --for RUN/recipe.yaml",
    "train RUN/recipe.yaml --resume", "train RUN/recipe.yaml --out o", "compare RUN/recipe.yaml --methods lora",
]  # fmt: skip


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, tiny_llama, tiny_tokenizer, slimtune) -> Path:
    """A run whose recipe trusts a base beside it, which brings code that leaves the file EXECUTED."""
    folder = tmp_path_factory.mktemp("stranger")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "base/own.py").write_text(CODE.format(mark=folder / "EXECUTED"))
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": MAP}))
    rows = write_rows(folder / "rows.jsonl", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        done = slimtune("train", "--model", folder / "base", "--data", rows, "--out", folder / "run", "--max-steps", 1,
                        "--dtype", "float32", "--set", f"data.test={rows}", "--trust-remote-code")  # fmt: skip
        assert done.exit_code == 0, done.stderr
        assert (folder / "EXECUTED").exists()
        assert "trust_remote_code: true" in (folder / "run/recipe.yaml").read_text()
        yield folder


@pytest.fixture(autouse=True)
def no_mark(stranger, tmp_path, monkeypatch):
    (stranger / "EXECUTED").unlink(missing_ok=True)
    shutil.rmtree(stranger / "modules", ignore_errors=True)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*does not count in a file")
@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_others_do_not_run_code(stranger, slimtune, command):
    words = command.replace("RUN", str(stranger / "run")).replace("ROWS", str(stranger / "rows.jsonl")).split()
    done = slimtune(*words)
    if "push" not in command:  # which goes on without the base
        assert done.exit_code == 2, done.output
        assert "--trust-remote-code" in done.stderr
    assert not (stranger / "EXECUTED").exists()


@pytest.mark.parametrize("command", ["generate RUN hi --max-new-tokens 2", "plan RUN/recipe.yaml"])
def test_flag(stranger, slimtune, command):
    done = slimtune(*command.replace("RUN", str(stranger / "run")).split(), "--trust-remote-code")
    assert done.exit_code == 0, done.output
    assert (stranger / "EXECUTED").exists()


@pytest.mark.filterwarnings("ignore:.*does not count in a file")
def test_library(stranger):
    with pytest.warns(UserWarning, match="trust_remote_code"), pytest.raises(UsageError, match="--trust-remote-code"):
        load_run(stranger / "run")
    assert type(load_run(stranger / "run", trust_remote_code=True).base.model).__name__ == "OwnModel"
