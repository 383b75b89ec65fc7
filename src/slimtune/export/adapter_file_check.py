"""Compare an exported adapter's file with the trained adapter, matrix by matrix.

An engine's log-probabilities say whether it computes the trained model, but one matrix of two hundred can be wrong
within their noise: half of one `lora_b` of SmolLM2 moves them less than llama.cpp's own arithmetic does. The file is
equal to the trained matrices up to the rounding of its precision, which needs no engine. What is read here is what
llama.cpp multiplies (`src/llama-adapter.h`): A, and B times alpha / r of the file, or times 1 without an alpha. The
order of B's rows is the writer's own (`reorder_rows_for_llama_cpp`): a wrong one changes all layers, which the
log-probabilities show.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..extras.gguf_loading import import_gguf, open_gguf_reader
from .gguf import (
    get_lora_factors_and_scales,
    make_gguf_module_name_mapper,
    reorder_rows_for_llama_cpp,
    split_gate_up_by_projection_name,
)

ScaledMatrix = tuple[Tensor, float]
"""A matrix of a file, and the factor that its reader multiplies it by."""


def require_trained_adapter_in_gguf(file: Path, model: Any, adapter_name: str = "default") -> None:
    """Raise AdapterError unless a GGUF file has the matrices of a model's LoRA, with their scales, and no others."""
    names, alpha_key = make_gguf_module_name_mapper(model.config), import_gguf().Keys.Adapter.LORA_ALPHA
    try:
        reader = open_gguf_reader(file)
        alpha = float(reader.fields[alpha_key].contents()) if alpha_key in reader.fields else 0.0
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except Exception as e:  # the reader fails in many ways
        raise AdapterError(f"{file} is damaged: {type(e).__name__}", "a complete GGUF file", "export again") from e
    found: dict[str, ScaledMatrix] = {}
    trained: dict[str, Tensor] = {}
    for module, (A, B, scale) in get_lora_factors_and_scales(model, adapter_name).items():
        for part, rows in (
            split_gate_up_by_projection_name(module, B, model.config) if B.dim() == 3 else {module: B}
        ).items():
            rows = reorder_rows_for_llama_cpp(rows.double(), part, model.config) * scale
            file_scale = alpha / A.shape[-2] if alpha else 1.0
            for letter, matrix, factor in (("a", A.double(), 1.0), ("b", rows, file_scale)):
                trained[name := f"{letter.upper()} of {part}"] = matrix
                if (values := tensors.pop(f"{names(part)}.weight.lora_{letter}", None)) is not None:
                    found[name] = torch.tensor(values), factor
    require_same_matrices(found | {name: (torch.tensor(values), 1.0) for name, values in tensors.items()}, trained)


def require_trained_adapter_in_model(read_back: Any, trained: Any, adapter_name: str = "default") -> None:
    """Raise AdapterError unless a model whose adapter was read from a file has another model's LoRA matrices."""
    (found, trained_matrices) = (
        {
            f"{letter} of {name}": scaled
            for name, module in model.adapter_modules(adapter_name).items()
            if (factors := module.low_rank_factors()) is not None
            for letter, scaled in (("A", (factors[0], 1.0)), ("B", (factors[1], factors[2])))
        }
        for model in (read_back, trained)
    )
    require_same_matrices(found, {name: matrix.double() * scale for name, (matrix, scale) in trained_matrices.items()})


def require_same_matrices(found: Mapping[str, ScaledMatrix], trained: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless a file's matrices, by what they are, are the trained ones, and there are no others.

    A matrix counts times its factor, and may differ by the rounding of the file.
    """
    wrong = [
        f"{name} {problem}"
        for name, matrix in trained.items()
        if (problem := _describe_difference(found.get(name), matrix.double().cpu()))
    ]
    wrong += [f"{name} is of no adapted module" for name in found.keys() - trained.keys()]
    if wrong:
        more = f" and {len(wrong) - 3} others" if len(wrong) > 3 else ""
        raise AdapterError(
            f"{len(wrong)} of the file's matrices are wrong: {'; '.join(wrong[:3])}{more}",
            "each A, and each B with its scale, as it was trained",
            "export again",
        )


def _describe_difference(scaled_matrix: ScaledMatrix | None, trained: Tensor) -> str:
    """Return how a file's matrix times a factor differs from the trained one beyond the file's rounding; "": not."""
    if scaled_matrix is None:
        return "is missing"
    found, factor = scaled_matrix
    if found.shape != trained.shape:
        return f"has the shape {tuple(found.shape)} for {tuple(trained.shape)}"
    precision, scaled = torch.finfo(found.dtype), found.double() * factor
    smallest = precision.smallest_normal * precision.eps * abs(factor)
    if torch.isclose(scaled, trained, rtol=4 * precision.eps, atol=smallest).all():
        return ""
    return f"is off by {((scaled - trained).norm() / trained.norm()).item():.2g} of its norm"
