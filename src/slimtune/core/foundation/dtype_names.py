"""Names of data types; without torch, so that a wrong one is answered at once."""

from typing import Any

DTYPE_ABBREVIATIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def dtype_name(dtype: Any) -> str:
    """Return the name of a torch dtype without its library: "float32"; of a name the name."""
    return str(dtype).removeprefix("torch.")


def llama_cpp_dtype_name(dtype: Any) -> str:
    """Return what llama.cpp calls a floating point dtype of torch, or of its name: "f32"."""
    full = dtype_name(dtype)
    return next(short for short, name in DTYPE_ABBREVIATIONS.items() if name == full).replace("fp", "f")
