"""The examples in docs/internals/extending.md work as they stand."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hand_run import save_adapter_of

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


def test_changed_lines_of_a_setting_fit_the_file():
    file, diff = re.search(r"```diff\n--- (.*?)\n@@ .*?\n(.*?)```", PAGE, re.DOTALL).groups()
    source = (ROOT / file).read_text()
    assert all(line[1:] in source for line in diff.splitlines() if line.startswith(" "))


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
