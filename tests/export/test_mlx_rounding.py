"""Matrices of an MLX folder are rounded with their inputs: MLX reads the words, and the outputs change less."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtune.export.mlx_rounding import AffineGroups, round_mlx_folder_with_inputs
from slimtune.generation.mlx_engine import is_mlx_lm_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_mlx_lm_installed(), reason="mlx-lm is not installed"),
]
DEQUANTIZE = """
import sys, numpy as np, mlx.core as mx
stored = np.load(sys.argv[1])
w, s, b = (mx.array(stored[name]) for name in ("weight", "scales", "biases"))
np.save(sys.argv[2], np.array(mx.dequantize(w, s, b, int(sys.argv[3]), int(sys.argv[4]))))
"""


def dequantize_in_mlx(folder, tensors, group_size, bits):
    """What MLX itself computes from words, scales and biases; in a process of its own, as MLX wants one."""
    values = {name: t.numpy().view(np.uint32) if name == "weight" else t.float().numpy() for name, t in tensors.items()}
    np.savez(folder / "in.npz", **values)
    words = [str(folder / "in.npz"), str(folder / "out.npy"), str(group_size), str(bits)]
    subprocess.run([sys.executable, "-c", DEQUANTIZE, *words], check=True)
    return torch.from_numpy(np.load(folder / "out.npy"))


def make_layer(outputs=12, width=128, seed=0):
    """A weight, and inputs whose directions matter unequally."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(600, 10, generator=generator) @ torch.randn(10, width, generator=generator)
    inputs += 0.1 * torch.randn(600, width, generator=generator)
    return torch.randn(outputs, width, generator=generator), inputs


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 128), (6, 32)])
def test_mlx_reads_what_was_chosen_and_outputs_change_less(bits, group_size, tmp_path):
    weight, inputs = make_layer()
    groups = AffineGroups(bits, group_size, torch.float16)
    read = dequantize_in_mlx(tmp_path, groups.round_with_inputs(weight, inputs.t() @ inputs / 600), group_size, bits)
    scales, biases = groups.find_scales_and_biases(weight, inputs.square().mean(0))
    s, b = (each.float().repeat_interleave(group_size, 1) for each in (scales, biases))
    nearest = s * ((weight - b) / s).round().clamp(0, 2**bits - 1) + b
    error, before = (((w - weight) @ inputs.t()).square().mean() for w in (read, nearest))
    assert error < 0.6 * before
    assert ((read - b) / s - ((read - b) / s).round()).abs().max() < 1e-2, "a value outside of the format"


def test_only_matrices_with_inputs_change(tmp_path):
    weight, inputs = make_layer()
    moment = inputs.t() @ inputs / 600
    (tmp_path / "source").mkdir()
    (tmp_path / "mlx").mkdir()
    save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "source" / "model.safetensors")
    start = AffineGroups(4, 64, torch.bfloat16).round_with_inputs(weight.flip(0), moment)
    stored = {f"{name}.{leaf}": t.view(torch.uint32) if leaf == "weight" else t.clone()
              for name in "ab" for leaf, t in start.items()}  # fmt: skip
    save_file({k: t.clone() for k, t in stored.items()}, tmp_path / "mlx" / "model.safetensors", {"format": "mlx"})
    assert round_mlx_folder_with_inputs(tmp_path / "mlx", tmp_path / "source", {"a": moment}, 4, 64) == ["a"]
    after = load_file(tmp_path / "mlx" / "model.safetensors")
    assert {n for n in after if not torch.equal(after[n].view(torch.uint8), stored[n].view(torch.uint8))} == {
        "a.weight", "a.scales", "a.biases",
    }  # fmt: skip
