"""LoftQ: A and B start as the error that quantization made in the weight.

    s · B A = the r largest singular components of W − W_q        W: before quantization, W_q: the NF4 or int8 weight

With inputs X of the layer, those components that change its outputs most (QERA, https://arxiv.org/abs/2410.06040):

    (1/n) XᵀX + λ I = L Lᵀ,    s · B A = the r largest singular components of (W − W_q) L, times L⁻¹

The quantized base does not change. Paper: https://arxiv.org/abs/2310.08659.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.data.tokenized_dataset import list_tokens_and_labels_by_row
from ...core.kernels.linear_layers import get_dequantized_weight, is_quantized
from ...errors import UsageError, format_names
from ...extras.layer_inputs import ROWS, add_damping, collect_layer_inputs, compute_second_moment
from .init_configs import LoftQConfig as LoftQConfig

_DAMPING = 0.1


def initialize_loftq(model: Any, base: Any, calibration_examples: Sequence[Mapping[str, Any]]) -> None:
    """Initialize the LoRA of a run, with the inputs of its layers on the first training rows.

    Args:
        model: the adapted model, its base loaded in NF4 or int8.
        base: the loaded base, which finds the safetensors files of its weights before quantization.
        calibration_examples: tokenized examples.
    """
    layers = {n: m for n, m in model.adapted_layers().items() if is_quantized(m)}
    ids = [ids for example in calibration_examples[:ROWS] for ids, _ in list_tokens_and_labels_by_row(dict(example))]
    inputs = collect_layer_inputs(model.get_base_model().eval(), layers, ids)
    replace_lora_weights_loftq(model, base.download_weights(), calibration_inputs=inputs)


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
    calibration_inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Initialize a LoRA adapter on a quantized base from the error of the quantization.

    PEFT ignores the scale s; here B is divided by it, so that s · B A is the error at any alpha.

    Args:
        peft_model: the adapted model, its base loaded in NF4 or int8.
        model_path: folder of the base's safetensors files, or such a file.
        adapter_name: name of the adapter.
        callback: called with the model and a layer's name after each layer; False restores that layer's A and B.
        calibration_inputs: samples `(n, in_features)` of layer inputs, by name; other layers use the plain error.
    """
    adapters = {n: a for n, a in peft_model.adapter_modules(adapter_name).items() if hasattr(a, "lora_A")}
    layers = {n: m for n, m in peft_model.adapted_layers().items() if n in adapters and is_quantized(m)}
    if not layers:
        message = "no adapted layer is quantized, so there is no quantization error to start from"
        raise UsageError(message, "a base loaded in NF4 or int8", 'on a float base: init_lora_weights="pissa"')
    files = _find_tensor_files(Path(model_path))
    for name, module in layers.items():
        adapter = adapters[name]
        A, B = adapter.lora_A.weight, adapter.lora_B.weight
        error = (
            _load_tensor(files, f"{name}.weight").to(A.device, torch.float32) - get_dequantized_weight(module).float()
        )
        up, down = approximate_quantization_error(error, A.shape[0], (calibration_inputs or {}).get(name))
        before = A.clone(), B.clone()
        A.copy_(down)
        B.copy_(up / adapter.scale)
        if callback is not None and not callback(peft_model, name):
            A.copy_(before[0])
            B.copy_(before[1])


def approximate_quantization_error(error: Tensor, rank: int, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `(out, rank)` and `(rank, in)`, whose product is nearest to the error; both have columns of equal norm."""
    if inputs is None:
        U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        root = S[:rank].sqrt()
        return U[:, :rank] * root, root[:, None] * Vh[:rank]
    L = torch.linalg.cholesky(add_damping(compute_second_moment(inputs.to(error.device)), _DAMPING))
    U, S, Vh = torch.linalg.svd(error.double() @ L, full_matrices=False)
    down = torch.linalg.solve_triangular(L, Vh[:rank], upper=False, left=False)
    norms = down.norm(dim=1)
    root = (S[:rank] * norms).sqrt()
    return (U[:, :rank] * root).to(error.dtype), (down * (root / norms)[:, None]).to(error.dtype)


def _find_tensor_files(path: Path) -> dict[str, Path]:
    """Return the file of each tensor; `path` is a safetensors file, or a folder of one, or of several with an index."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {key: path / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"there is no {file}", "the weights before quantization, as safetensors")
    with safe_open(str(file), framework="pt") as f:
        return dict.fromkeys(f.keys(), file)


def _load_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    """Return a tensor; in a file of the backbone alone its name lacks the first part."""
    key = next((k for k in (name, name.partition(".")[2]) if k in files), None)
    if key is None:
        raise UsageError(f"the files lack {name}", f"one of {format_names(files, 4)}")
    with safe_open(str(files[key]), framework="pt") as f:
        return f.get_tensor(key)
