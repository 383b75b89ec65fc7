"""Compare an exported adapter's file with the trained adapter, matrix by matrix.

An engine's log-probabilities say whether it computes the trained model, but one matrix of two hundred can be wrong
within their noise: half of one `lora_b` of SmolLM2 moves them less than llama.cpp's own arithmetic does. The file is
equal to the trained matrices up to the rounding of its precision, which needs no engine. What is read here is what
llama.cpp multiplies (`src/llama-adapter.h`): A, and B times alpha / r of the file, or times 1 without an alpha. The
order of B's rows is the writer's own (`reorder_rows_for_llama_cpp`): a wrong one changes all layers, which the
log-probabilities show.
"""

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


def require_trained_adapter_in_gguf(file: Path, model: Any, adapter_name: str = "default") -> None:
    """Raise AdapterError unless a GGUF file has the matrices of a model's LoRA, with their scales, and no others."""
    names, alpha_key = make_gguf_module_name_mapper(model.config), import_gguf().Keys.Adapter.LORA_ALPHA
    try:
        reader = open_gguf_reader(file)
        alpha = float(reader.fields[alpha_key].contents()) if alpha_key in reader.fields else 0.0
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except Exception as e:  # the reader fails in many ways
        raise AdapterError(f"{file} is damaged: {type(e).__name__}", "a complete GGUF file", "export again") from e
    wrong: list[str] = []
    for module, (A, B, scale) in get_lora_factors_and_scales(model, adapter_name).items():
        for part, rows in (
            split_gate_up_by_projection_name(module, B, model.config) if B.dim() == 3 else {module: B}
        ).items():
            rows = reorder_rows_for_llama_cpp(rows.double(), part, model.config) * scale
            file_scale = alpha / A.shape[-2] if alpha else 1.0
            for letter, trained, factor in (("a", A.double(), 1.0), ("b", rows, file_scale)):
                values = tensors.pop(f"{names(part)}.weight.lora_{letter}", None)
                found = None if values is None else torch.tensor(values)
                if problem := _describe_difference(found, factor, trained.cpu()):
                    wrong.append(f"{letter.upper()} of {part} {problem}")
    wrong += [f"{name} is of no adapted module" for name in tensors]
    _require_no_differences(wrong)


def require_trained_adapter_in_model(read_back: Any, trained: Any, adapter_name: str = "default") -> None:
    """Raise AdapterError unless a model whose adapter was read from a file has another model's LoRA matrices."""
    wrong: list[str] = []
    found = {name: module.low_rank_factors() for name, module in read_back.adapter_modules(adapter_name).items()}
    for module, own in trained.adapter_modules(adapter_name).items():
        A, B, scale = own.low_rank_factors()
        its_A, its_B, its_scale = found.pop(module, None) or (None, None, 1.0)
        for letter, matrix, factor, expected in (("A", its_A, 1.0, A), ("B", its_B, its_scale, B.double() * scale)):
            if problem := _describe_difference(matrix, factor, expected.double()):
                wrong.append(f"{letter} of {module} {problem}")
    _require_no_differences([*wrong, *(f"{module} is adapted only in the file" for module in found)])


def _require_no_differences(differences: list[str]) -> None:
    if differences:
        more = f" and {len(differences) - 3} others" if len(differences) > 3 else ""
        raise AdapterError(
            f"{len(differences)} of the file's matrices are wrong: {'; '.join(differences[:3])}{more}",
            "each A, and each B with its scale, as it was trained",
            "export again",
        )


def _describe_difference(found: Tensor | None, factor: float, trained: Tensor) -> str:
    """Return how a file's matrix times a factor differs from the trained one beyond the file's rounding; "": not."""
    if found is None:
        return "is missing"
    if found.shape != trained.shape:
        return f"has the shape {tuple(found.shape)} for {tuple(trained.shape)}"
    precision, scaled = torch.finfo(found.dtype), found.double() * factor
    smallest = precision.smallest_normal * precision.eps * abs(factor)
    if torch.isclose(scaled, trained, rtol=4 * precision.eps, atol=smallest).all():
        return ""
    return f"is off by {((scaled - trained).norm() / trained.norm()).item():.2g} of its norm"
