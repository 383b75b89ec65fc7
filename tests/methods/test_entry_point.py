"""A method from a package of its own, registered by an entry point, works like a built-in one."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slimtune.core.training.run_dir import RunDir

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
INFO = "slimtune_tilt-1.0.dist-info"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Install the package from a wheel with pip; return an environment that has it."""
    folder = tmp_path_factory.mktemp("outsider")
    wheel = folder / "slimtune_tilt-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(HERE / "outsider/tilt.py", "slimtune_tilt.py")
        z.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: slimtune-tilt\nVersion: 1.0\n")
        z.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{INFO}/entry_points.txt", "[slimtune.methods]\ntilt = slimtune_tilt\n")
        z.writestr(f"{INFO}/RECORD", "")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_python(arguments, environment):
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_keeps_the_contract(installed):
    output = run_python(["pytest", HERE / "test_contract.py", "-k", "tilt", "-vv"], installed)
    assert "test_merged_equals_the_forward[gpt2-tilt] PASSED" in output
    assert " passed" in output
    assert "skipped" not in output


def test_the_command_line_lists_it(installed):
    methods = {m["name"]: m for m in json.loads(run_python(["slimtune", "methods", "--json"], installed))["methods"]}
    assert methods["tilt"]["summary"].startswith("Tilt: ")
    assert "tilt" not in {m["name"] for m in json.loads(run_python(["slimtune", "methods", "--json"], None))["methods"]}


def test_trains_and_loads(installed, tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "abc abc"}]}
    rows.write_text(f"{json.dumps(row)}\n" * 12)
    out = tmp_path / "run"
    run_python(["slimtune", "train", "--model", tiny_folder, "--data", rows, "--method", "tilt", "--out", out,
         "--lr", "0.01", "--epochs", "2", "--json"], installed)  # fmt: skip
    adapter = RunDir.open(out).adapter
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "TILT"
    code = "import sys, slimtune; m = slimtune.load_run(sys.argv[1]).model; print(m.peft_type, m.match_report())"
    done = subprocess.run([sys.executable, "-c", code, str(out)], env=installed, capture_output=True, text=True)
    assert done.stdout.startswith("TILT adapted 14 modules"), done.stdout + done.stderr
    # Without the package, loading names the missing method.
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "'TILT'" in done.stderr
