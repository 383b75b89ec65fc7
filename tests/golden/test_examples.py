"""Scripts written for peft run with only the import changed, and give the same numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def outcome(script, base, out):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, base, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    numbers = [float(n) for n in re.findall(r"^(?:loss|reloaded) (\S+)$", done.stdout, re.M)]
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    words = [line for line in done.stdout.splitlines() if line.startswith(("trainable", "adapters"))]
    return numbers, words, adapter


@pytest.mark.parametrize("name", ["peft_quicktour", "trl_sft_quickstart"])
def test_only_the_import_changes(name, tiny_folder, tmp_path):
    script = EXAMPLES / f"{name}.py"
    text = script.read_text()
    assert text.count("from slimtune import") == 1
    changed = tmp_path / f"{name}_peft.py"
    changed.write_text(text.replace("from slimtune import", "from peft import"))
    numbers, words, adapter = outcome(script, tiny_folder, tmp_path / "ours")
    their_numbers, their_words, their_adapter = outcome(changed, tiny_folder, tmp_path / "theirs")
    assert numbers
    assert numbers == pytest.approx(their_numbers, abs=1e-5)
    assert words == their_words
    assert len(words) == 1
    assert set(adapter) == set(their_adapter)
    assert all(torch.allclose(adapter[k], their_adapter[k], atol=1e-6) for k in adapter)
    assert all(t.any() for t in adapter.values())
