"""The example of the page about PEFT, run as it stands, on the real base."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/peft.md").read_text()


@pytest.mark.real
def test_the_quick_start_runs_as_written(smollm2_folder, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    # The Hub id is a folder of that name here: from_pretrained takes it first.
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(smollm2_folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params: 4,884,480" in done.stdout
    assert "adapted 210 modules" in done.stdout
    quick = tmp_path / "runs" / "quick"
    assert (quick / "adapter" / "adapter_model.safetensors").stat().st_size < 20e6
    assert not (quick / "checkpoint-3" / "model.safetensors").exists()
    with safe_open(str(quick / "merged" / "model.safetensors"), "pt") as f:
        assert not any("lora" in k for k in f.keys())  # noqa: SIM118


def test_no_number_is_left_to_fill_in():
    assert "@@" not in PAGE
