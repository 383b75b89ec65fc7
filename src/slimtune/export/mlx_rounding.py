"""Round the matrices of an MLX folder in few bits with the inputs of their layers, in place of MLX's rounding.

mlx-lm has written the folder and chosen which matrices are quantized. A row of a matrix is cut into groups; a weight is

    value = scale · quant + bias,   quant of 2 to 8 bits; scale and bias of a group in 16 bits

Quants of a row follow one another as bits, the lowest first, in 32-bit words. Here other scales, biases and quants are
written into the same files (see `gptq_rounding.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.foundation.progress_bars import track_progress
from .gptq_rounding import round_quants_with_inputs
from .merged_weights import CheckpointTensors

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's range that are tried: fewer values far out are exact, and more near the middle."""


@dataclass(frozen=True)
class AffineGroups:
    """MLX's affine format; `dtype` is that of scales and biases."""

    bits: int
    group_size: int
    dtype: torch.dtype

    def find_scales_and_biases(self, weight: Tensor, importances: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of each group `(out, in / group_size)`, for errors weighted by `importances` `(in,)`."""
        groups, top = weight.unflatten(1, (-1, self.group_size)), 2**self.bits - 1
        important = importances.unflatten(0, (-1, self.group_size))
        low, high = groups.amin(2), groups.amax(2)
        best: tuple[Tensor, Tensor] | None = None
        least = torch.full(low.shape, torch.inf)
        for shrink in SHRINKS:
            middle, half = (low + high) / 2, (high - low) / 2 * shrink
            scale = (2 * half / top).clamp_min(1e-7).to(self.dtype)
            bias = (middle - half).to(self.dtype)
            s, b = scale.float()[:, :, None], bias.float()[:, :, None]
            rounded = s * ((groups - b) / s).round_().clamp_(0, top) + b
            error = ((groups - rounded).square() * important).sum(2)
            is_better = error < least
            least = torch.where(is_better, error, least)
            best = (
                (scale, bias)
                if best is None
                else (torch.where(is_better, scale, best[0]), torch.where(is_better, bias, best[1]))
            )
        assert best is not None
        return best

    def pack(self, quants: Tensor) -> Tensor:
        """Return the words of quants, uint8 `(out, in)`, as int32 `(out, in · bits / 32)`."""
        bits = quants.unsqueeze(-1) >> torch.arange(self.bits, dtype=torch.uint8) & 1
        places = 2 ** torch.arange(8, dtype=torch.uint8)
        bytes_ = (bits.flatten(1).unflatten(1, (-1, 8)) * places).sum(2, dtype=torch.uint8)
        return bytes_.contiguous().view(torch.int32)

    def round_with_inputs(self, weight: Tensor, second_moment: Tensor) -> dict[str, Tensor]:
        """Return a matrix's tensors by their leaf; its outputs on inputs with this moment `(in, in)` change little."""
        weight = weight.float()
        scales, biases = self.find_scales_and_biases(weight, second_moment.diagonal())
        scale, bias = (each.float().repeat_interleave(self.group_size, 1) for each in (scales, biases))

        def find_nearest_quants(values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return ((values - bias) / scale).round_().clamp_(0, 2**self.bits - 1).long()

        nearest = find_nearest_quants(weight, scale, bias)
        levels = torch.arange(2**self.bits, dtype=torch.float32)
        quants, is_better = round_quants_with_inputs(
            weight, second_moment, scale, bias, find_nearest_quants, levels, scale * nearest + bias
        )
        words = self.pack(torch.where(is_better[:, None], quants, nearest.to(torch.uint8)))
        return {"weight": words, "scales": scales, "biases": biases}


def round_mlx_folder_with_inputs(
    folder: Path, source: Path, second_moments: Mapping[str, Tensor], bits: int, group_size: int
) -> list[str]:
    """Round the quantized matrices of an MLX folder again; return the names of their modules.

    Args:
        folder: of mlx-lm's conversion; its weights are changed.
        source: the Hugging Face folder that it was made from.
        second_moments: of the inputs of linear layers `(in, in)`, by the module's name. Other matrices stay as they
            are.
        bits, group_size: of the conversion.
    """
    weights = CheckpointTensors(source)
    rounded = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata()
        names = [name for name in second_moments if f"{name}.scales" in tensors and f"{name}.weight" in weights.files]
        names.sort(key=lambda name: id(second_moments[name]))  # what is computed of an input serves q, k and v
        for name in track_progress(names, "matrices rounded with rows"):
            groups = AffineGroups(bits, group_size, tensors[f"{name}.scales"].dtype)
            found = groups.round_with_inputs(weights.load(f"{name}.weight"), second_moments[name])
            stored = {leaf: tensors[f"{name}.{leaf}"] for leaf in found}
            if any(found[leaf].shape != stored[leaf].shape for leaf in found):
                continue  # mlx-lm keeps this matrix in other bits or groups
            found["weight"] = found["weight"].view(stored["weight"].dtype)
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in found.items()}
            rounded.append(name)
        if names:
            save_file(tensors, file, metadata)
    return rounded
