"""LoftQ: A and B start as what quantization took from the weight.

    s · B A = the r largest singular parts of W − W_q        W: before quantization, W_q: the base's NF4 or int8 weight

With inputs X of the layer, those that its products miss most (QERA, arXiv 2410.06040):

    (1/n) XᵀX + λ I = L Lᵀ,    s · B A = the r largest singular parts of (W − W_q) L, times L⁻¹

The base stays as it is quantized. Paper: https://arxiv.org/abs/2310.08659.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import UsageError, format_names
from ...utils.calibration import second_moment
from ...utils.linear_layers import get_weight, is_quantized

_DAMPING = 0.1
_INDEX = "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    model: Any,
    model_path: str | os.PathLike,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Start a LoRA adapter on a quantized base from the difference to the weights before quantization.

    PEFT leaves the scale s out of account; here it is taken out of B, so that s · B A is the difference at any alpha.

    Args:
        model: the adapted model, its base loaded in NF4 or int8.
        model_path: folder of the base's safetensors files, or such a file.
        adapter_name: the adapter.
        callback: called with the model and a layer's name after each layer; False takes that layer's start back.
        inputs: a sample `(n, in_features)` of what layers are given, by name; a layer without one goes without.

    Raises:
        UsageError: no adapted layer is quantized, or the files do not hold a layer's weight.
    """
    layers: dict[str, Any] = {n: m for n, m in model.adapted_layers().items() if is_quantized(m)}
    layers = {
        n: m for n, m in layers.items() if adapter_name in m.adapters and hasattr(m.adapters[adapter_name], "lora_A")
    }
    if not layers:
        raise UsageError(
            "no adapted layer is quantized: nothing was lost that LoftQ could start from",
            "a base loaded in NF4 or int8",
            'on a float base take another start: init_lora_weights="pissa"',
        )
    files = _Files(Path(model_path))
    for name, module in layers.items():
        delta = module.adapters[adapter_name]
        A, B = delta.lora_A.weight, delta.lora_B.weight
        lost = files.weight(f"{name}.weight").to(A.device, torch.float32) - get_weight(module).float()
        up, down = _largest(lost, A.shape[0], (inputs or {}).get(name))
        before = A.clone(), B.clone()
        A.copy_(down)
        B.copy_(up / delta.scale)
        if callback is not None and not callback(model, name):
            A.copy_(before[0])
            B.copy_(before[1])


def _largest(lost: Tensor, rank: int, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `(out, rank)` and `(rank, in)`, whose product is what to make up for; rows and columns are alike long."""
    if inputs is None:
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        root = S[:rank].sqrt()
        return U[:, :rank] * root, root[:, None] * Vh[:rank]
    L = torch.linalg.cholesky(second_moment(inputs.to(lost.device), _DAMPING))
    U, S, Vh = torch.linalg.svd(lost.double() @ L, full_matrices=False)
    down = torch.linalg.solve_triangular(L, Vh[:rank], upper=False, left=False)
    length = down.norm(dim=1)
    root = (S[:rank] * length).sqrt()
    return (U[:, :rank] * root).to(lost.dtype), (down * (root / length)[:, None]).to(lost.dtype)


class _Files:
    """The tensors of one safetensors file, or of several with an index."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        if (folder / _INDEX).is_file() and path.is_dir():
            self.where = {k: folder / f for k, f in json.loads((folder / _INDEX).read_text())["weight_map"].items()}
            return
        file = folder / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"there is no {file}", "the weights before quantization, as safetensors")
        with safe_open(str(file), framework="pt") as f:
            self.where = dict.fromkeys(f.keys(), file)

    def weight(self, name: str) -> Tensor:
        """Return a tensor; a file of the backbone alone leaves the first part of the name out."""
        key = next((k for k in (name, name.partition(".")[2]) if k in self.where), None)
        if key is None:
            raise UsageError(f"the files hold no {name}", f"one of {format_names(self.where, 4)}")
        with safe_open(str(self.where[key]), framework="pt") as f:
            return f.get_tensor(key)
