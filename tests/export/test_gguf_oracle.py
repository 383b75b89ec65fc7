"""Our GGUFs beside those of llama.cpp's own converters, tensor by tensor, where those are right.

They ignore rsLoRA and alpha patterns, and for GPT-2 exchange A and B; what llama.cpp computes from ours is tested in
`test_gguf_adapter.py`. `make test` brings the converters (`LLAMA_CPP`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_zoo import shake
from tiny_ggufs import model_of

import slimtune
from slimtune.export.gguf import write_adapter
from slimtune.export.gguf_model import CONVERTER, converted, found, like

gguf = pytest.importorskip("gguf")
SCRIPT = Path(os.environ.get("LLAMA_CPP", "."), "convert_lora_to_gguf.py")
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="llama.cpp's converters are not here (LLAMA_CPP)")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
def test_the_adapter_is_the_converters(kind, tmp_path):
    base = model_of(kind, 320)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "base")
    config = slimtune.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = slimtune.get_peft_model(base, config)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    write_adapter(tmp_path / "ours.gguf", model)
    command = [sys.executable, SCRIPT, "--base", tmp_path / "base", "--outfile", tmp_path / "its.gguf"]
    done = subprocess.run([*map(str, command), str(tmp_path / "adapter")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, its = (tensors(tmp_path / f"{name}.gguf") for name in ("ours", "its"))
    assert set(ours) == set(its)
    assert all(np.array_equal(ours[n], its[n]) for n in its)


@pytest.mark.real
def test_a_whole_model_is_the_converters(smollm2_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from slimtune.models.source import resolve_model

    assert found(CONVERTER)
    converted(smollm2_folder, tmp_path / "its.gguf", "f16")
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    like(Path(resolve_model("smollm2-135m").path), model, tmp_path / "ours.gguf", "f16")
    ours, its = (tensors(tmp_path / f"{name}.gguf") for name in ("ours", "its"))
    assert set(ours) == set(its)
    assert all(np.array_equal(ours[n], its[n]) for n in its)


def tensors(file: Path) -> dict[str, Any]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(str(file)).tensors}
