"""The examples in docs/internals/extending.md work as they stand."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hand_run import save_adapter_of
from row_files import write_jsonl
from tiny_run import metrics

import slimtune
from slimtune.core.foundation import registry
from slimtune.export.export_format import ExportFormat
from slimtune.export.exporter import export
from slimtune.export.verify import verify

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/internals/extending.md").read_text()


@pytest.fixture
def load_example(monkeypatch):
    """Run the example that has a class as a module of slimtune; what only the type checker imports is imported, too."""

    def load(class_name: str, module_name: str) -> ModuleType:
        (source,) = (s for s in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {class_name}(" in s)
        module = ModuleType(module_name)
        module.__package__ = module_name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, module_name, module)
        exec(source.replace("if TYPE_CHECKING:", "if True:"), vars(module))
        return module

    return load


def apply_diff(root: Path, file: str, hunk: str) -> None:
    """Apply one diff of the page: its context and its removed lines occur once in the file, one below the other."""
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +"))
    source = (root / file).read_text()
    assert source.count(old) == 1, f"the page's diff of {file} does not fit it"
    (root / file).write_text(source.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the source with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"^( *)```(diff|python)\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    for indent, kind, block in blocks:
        text = textwrap.dedent(block) if indent else block
        if kind == "diff":
            file, hunk = re.fullmatch(r"--- (\S+)\n@@ [^\n]*\n(.*)", text, re.DOTALL).groups()
            apply_diff(root, file, hunk)
        else:
            named = re.match(r"# (src/\S+)\n", text)
            (root / (named[1] if named else "src/slimtune/objectives/hinge.py")).write_text(text)
    assert [kind for _, kind, _ in blocks] == ["diff", "diff", "python", "python"]
    return root


def test_diffs_of_the_page_fit_the_files(extended):
    for file in ("core/config/schema.py", "core/training/resuming.py"):
        text = (extended / "src/slimtune" / file).read_text()
        assert ast.parse(text)
        assert "warmup_steps" in text


@pytest.mark.slow
def test_diffs_and_files_of_the_page_make_a_source_that_trains_and_exports(extended, tiny_folder, tmp_path):
    """`--warmup-steps`, `--task hinge` and `--to peft` are flags of the command, in one run of two steps."""

    def run(*words: object) -> dict[str, Any]:
        environment = {**os.environ, "PYTHONPATH": str(extended / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "slimtune", *map(str, words), "--json"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    pair = {"prompt": "say a", "chosen": "abc", "rejected": "xyz"}
    write_jsonl(tmp_path / "pairs.jsonl", [pair] * 8)
    words = ["--model", tiny_folder, "--data", "pairs.jsonl", "--out", "run", "--dtype", "float32", "--lr", 1e-2]
    words += ["--task", "hinge", "--set", "task.beta=0.5", "--warmup-steps", 2, "--max-steps", 2]
    assert run("train", *words)["steps"] == 2
    assert metrics(tmp_path / "run", "learning_rate") == [5e-3, 1e-2]  # without the setting: 1e-2 at first
    assert run("export", "run", "--to", "peft", "--out", "out", "--no-tokenizer")["check"]["passed"]


def test_objective_of_the_page_compares_two_answers(load_example):
    hinge = load_example("Hinge", "slimtune.objectives.hinge").Hinge(beta=0.5)
    losses, rewards = hinge.pair_losses(torch.tensor([[-2.0, -3.0], [-5.0, -1.0]]), torch.ones(2, 2), None)
    assert losses.tolist() == [0.5, 3.0]
    assert rewards.tolist() == [[-1.0, -1.5], [-2.5, -0.5]]


def test_export_format_of_the_page_is_proven(load_example, monkeypatch, tiny_folder, tmp_path):
    load_example("PeftFormat", "slimtune.export.peft_format")
    paths = {"peft": "slimtune.export.peft_format:PeftFormat"}
    monkeypatch.setattr(registry, "_PATHS", {**registry._PATHS, "slimtune.export_formats": paths})
    run = save_adapter_of(tiny_folder, tmp_path / "run", slimtune.LoraConfig(r=4, target_modules="all-linear"))
    assert export(run, "peft", tmp_path / "out", {"tokenizer": False}).check.passed
    assert verify(tmp_path / "out").passed


def test_hooks_of_an_export_format_exist():
    table = PAGE.partition("| the format | it has |")[2].partition("\n\n")[0]
    names = [n for row in table.splitlines() for n in re.findall(r"`(\w+)`", row.rpartition(" | ")[2])]
    assert len(names) >= 6
    assert all(hasattr(ExportFormat, name) for name in names)
