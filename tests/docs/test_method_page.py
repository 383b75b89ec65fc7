"""The method of docs/internals/adding_a_method.md works as it stands, and the names on the page exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from slimtune.core.adapters.peft_config import PeftConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/internals/adding_a_method.md").read_text()
CLASSES = {c.__name__: c for c in (AdapterModule, BaseForward, PeftConfig)}
LOAD = """
import sys
import slimtune.methods
from slimtune.core.foundation.registry import register_parts
slimtune.methods.__path__.append(sys.argv[1])
register_parts("slimtune.methods", {"tilt": "slimtune.methods.tilt"})
"""
CONFIG_WITHOUT_TORCH = "import slimtune; slimtune.TiltConfig; sys.exit('torch' in sys.modules)"
NAMES_OF_PEFT = """
import sys
from slimtune.methods.tilt import TiltConfig
TiltConfig.exists_in_peft = True
from slimtune import TiltModel, get_peft_model
from slimtune.tuners.tilt.layer import TiltLayer
from slimtune.utils.constants import TRANSFORMERS_MODELS_TO_TILT_TARGET_MODULES_MAPPING as TARGETS
sys.path.append(".")
from models_zoo import llama
model = get_peft_model(llama(), TiltConfig(target_modules=["q_proj"]))
layer = model.model.layers[0].self_attn.q_proj
print(isinstance(model.base_model, TiltModel), isinstance(layer, TiltLayer), len(TARGETS) > 9)
"""
CONTRACT = """
import method_cases, pytest
from method_cases import ALL, Case
method_cases.CASES[{name}] = {case}
sys.exit(pytest.main([*sys.argv[2:], "-p", "no:cacheprovider"]))
"""


@pytest.fixture
def run_with_method(tmp_path):
    """Write the files of the page; run code in a process where they are a method of slimtune."""
    for path, text in re.findall(r"```python\n# src/slimtune/methods/(\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", LOAD + code, str(tmp_path), *arguments]
        done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_config_needs_no_torch(run_with_method):
    run_with_method(CONFIG_WITHOUT_TORCH)


@pytest.mark.slow
def test_names_of_peft_follow_from_the_method(run_with_method):
    assert run_with_method(NAMES_OF_PEFT).split() == ["True", "True", "True"]


@pytest.mark.slow
def test_method_keeps_the_contract(run_with_method):
    name, case = re.search(r'`("\w+"): (Case\(.*?\)),`', PAGE).groups()
    code = CONTRACT.format(name=name, case=case)
    output = run_with_method(code, "methods/test_contract.py", "-k", "tilt", "-rA")
    assert "PASSED methods/test_contract.py::test_merged_equals_the_forward[gpt2-tilt]" in output


def test_package_of_its_own_has_the_same_module():
    outsider = (ROOT / "tests/methods/outsider/tilt.py").read_text()
    statements = [
        line.strip() for line in outsider.partition("class LinearTilt")[2].splitlines()[1:] if "def " not in line
    ]
    assert [line for line in statements if line not in PAGE] == []


def test_names_in_the_tables_exist():
    tables = re.findall(r"^\| `(\w+)`[^\n]*\n\| --- \| --- \|\n((?:\|[^\n]*\n)+)", PAGE, re.MULTILINE)
    assert {name for name, _ in tables} == set(CLASSES)
    for class_name, rows in tables:
        names = re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)
        assert len(names) == rows.count("\n")
        assert [n for n in names if not hasattr(CLASSES[class_name], n)] == []


def test_names_and_files_in_the_text_exist():
    known = {*dir(AdapterModule), *dir(PeftConfig), *AdapterSite.__dataclass_fields__, *dir(AdapterSite)}
    named = re.findall(r"`site\.(\w+)", PAGE) + re.findall(r"`(build_all|get_no_op_values|fields_not_in_peft)`", PAGE)
    assert len(named) >= 6
    assert [n for n in named if n not in known] == []
    files = re.findall(r"(?:src|tests|docs|benchmarks|core)/[\w/]+\.(?:py|md)", PAGE.replace("NAME", "vera"))
    missing = [f for f in files if not any((folder / f).is_file() for folder in (ROOT, ROOT / "src/slimtune"))]
    assert [f for f in missing if "methods/tilt/" not in f] == []
