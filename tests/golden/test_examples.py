"""The examples run: scripts written for peft give the same numbers, and TRL trains adapters by a reward."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimtune import PeftModel

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


@pytest.mark.parametrize("flags", [[], ["--dora"]], ids=["lora", "dora"])
def test_grpo_trains_an_adapter_that_peft_loads(flags, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", str(tiny_folder), "--steps", "3", "--out", str(tmp_path), *flags])
    runpy.run_path(str(EXAMPLES / "grpo.py"), run_name="__main__")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    starts_at_zero = [t for name, t in trained.items() if "lora_B" in name]
    assert len(starts_at_zero) == 14
    assert all(t.any() for t in starts_at_zero)
    assert any("lora_magnitude_vector" in name for name in trained) == bool(flags)
    logits = []
    for load in (None, PeftModel.from_pretrained, peft.PeftModel.from_pretrained):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model = model if load is None else load(model, tmp_path / "adapter")
        with torch.no_grad():
            logits.append(model.eval()(torch.arange(3, 60)[None]).logits)
    base, ours, theirs = logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs - base).abs().max() > 1e-4
