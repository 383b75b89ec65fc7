"""Programs of llama.cpp that make GGUF files: its converter of Hugging Face folders, and its quantizer.

The converter is a Python script, found in `$LLAMA_CPP` or on the PATH. The quantizer is a function of llama.cpp's
library, `llama_model_quantize`, which `llama-quantize` calls, too: it chooses the type of each tensor. The package
`llama-cpp-py-sync` brings that library with bindings generated from its header; without the package `llama-quantize`
does. Both run in a process of their own, because llama.cpp ends the process where an assertion fails.
"""

import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, RunError, UsageError, format_install_command, format_names, suggest

log = logging.getLogger(__name__)
PRECISIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Precisions of a whole model that are written without llama.cpp, with gguf's name of the file type."""
QUANTIZED_PRECISIONS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M",
    "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip
"""Precisions that llama.cpp's quantizer makes, fewest bits first. Those below 2.5 bits need importances: left out."""
SMALL_BLOCK_PRECISIONS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
"""Their blocks have 32 weights; those of the others 256."""
CONVERTER, QUANTIZER, QUANTIZER_PACKAGE = "convert_hf_to_gguf.py", "llama-quantize", "llama_cpp_py_sync"


class LlamaCppToolFailedError(RunError):
    """A program of llama.cpp failed: nothing is known about what it should have made."""


# --- converter -------------------------------------------------------------------------------------------------------


def convert_hf_to_gguf(folder: Path, file: Path, precision: str = "f16") -> None:
    """Write a Hugging Face folder as GGUF by llama.cpp's own converter; ModelError if it is missing."""
    script = require_gguf_converter()
    _run_tool([sys.executable, script, str(folder), "--outfile", str(file), "--outtype", precision], CONVERTER)


def require_gguf_converter() -> str:
    """Return the path of `convert_hf_to_gguf.py`, or raise ModelError."""
    copy = 'git clone --depth 1 https://github.com/ggml-org/llama.cpp && export LLAMA_CPP="$PWD/llama.cpp"'
    hint = f"get llama.cpp's source, and build nothing: {copy}; or do without a GGUF: slimtune serve, or --to vllm"
    return _require_tool_path(CONVERTER, "makes a GGUF of a Hugging Face base", hint)


# --- quantizer -------------------------------------------------------------------------------------------------------


def is_llama_cpp_library_installed() -> bool:
    """Return whether the package that brings llama.cpp's library is installed."""
    return importlib.util.find_spec(QUANTIZER_PACKAGE) is not None


def resolve_gguf_precision(precision: str) -> str:
    """Return a precision as files have it: `f16`, `Q4_K_M`; UsageError if no GGUF is written in it.

    ModelError means that it is made by llama.cpp's quantizer, which is missing.
    """
    if precision.lower() in PRECISIONS:
        return precision.lower()
    if (name := precision.upper()) not in QUANTIZED_PRECISIONS:
        known = [*PRECISIONS, *reversed(QUANTIZED_PRECISIONS)]
        raise UsageError(f"a GGUF in {precision!r}{suggest(name, known)}", f"one of {format_names(known)}")
    if not is_llama_cpp_library_installed():
        hint = f"{format_install_command('export-check')}; or --precision q8_0, which slimtune writes itself"
        _require_tool_path(QUANTIZER, f"makes {name}", hint)
    return name


def quantize_gguf(
    source: Path, file: Path, precision: str, importances: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a GGUF in one of `QUANTIZED_PRECISIONS` by llama.cpp's quantizer, which chooses the type of each tensor.

    Args:
        source: a GGUF in 16 or 32 bits.
        file: to write.
        precision: of most of its weights.
        importances: of each input of a matrix `(in,)`, by the tensor's name: the mean of its squares. Rounding errors
            are weighted by them.

    Raises:
        ModelError: the quantizer is not installed.
        RunError: it failed.
    """
    precision = resolve_gguf_precision(precision)
    if not is_llama_cpp_library_installed():
        if importances:
            raise ModelError(
                "weighting errors by importance needs the package llama-cpp-py-sync",
                hint=format_install_command("export-check"),
            )
        _run_tool([_require_tool_path(QUANTIZER, f"makes {precision}", ""), str(source), str(file), precision])
        return
    command = [sys.executable, "-m", __name__, str(source), str(file), precision]
    if not importances:
        _run_tool(command, "quantizer")
        return
    with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
        arrays: dict[str, Any] = {name: np.ascontiguousarray(a, np.float32) for name, a in importances.items()}
        np.savez(Path(folder, "importances.npz"), **arrays)
        _run_tool([*command, str(Path(folder, "importances.npz"))], "quantizer")


def find_quantized_types(source: Path, precision: str) -> dict[str, str]:
    """Return the type that llama.cpp's quantizer would give each tensor of a GGUF, by its name; nothing is written.

    Raises:
        ModelError: its library is not installed.
        RunError: it failed.
    """
    if not is_llama_cpp_library_installed():
        raise ModelError("llama.cpp's quantizer is not installed", hint=format_install_command("export-check"))
    text = _run_tool([sys.executable, "-m", __name__, str(source), "", resolve_gguf_precision(precision)], "quantizer")
    lines = re.finditer(r"^\[.*?\] +(\S+) +- \[.*?type = +(\w+), size = [^(\n]*(?:\((\w+)\))?", text, re.MULTILINE)
    return {name: (chosen or own).upper() for name, own, chosen in (line.groups() for line in lines)}


def describe_fallback_types(file: Path, precision: str) -> str:
    """Return which matrices of a GGUF have another type because their rows are not whole blocks; "" if none has."""
    from ..extras.gguf_loading import open_gguf_reader

    block = 32 if precision in SMALL_BLOCK_PRECISIONS else 256
    if precision in PRECISIONS:
        return ""
    matrices = [t for t in open_gguf_reader(file).tensors if len(t.shape) > 1]
    odd = [t for t in matrices if t.shape[0] % block]
    if not odd:
        return ""
    lengths = format_names(sorted({str(t.shape[0]) for t in odd}), 4)
    types = format_names(sorted({t.tensor_type.name for t in odd}))
    return (
        f"{len(odd)} of {len(matrices)} matrices have rows of {lengths} weights, no multiple of the {block} that "
        f"{precision} packs: they are in {types}, llama.cpp's choice for such rows"
    )


def _quantize_here(source: str, file: str, precision: str, importances: str | None = None) -> None:
    """Call llama.cpp's `llama_model_quantize` in this process; arguments as for `quantize_gguf`, as paths.

    With an empty `file` it only prints the types that it would choose.
    """
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    params = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    params.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{precision}")
    params.dry_run = not file
    alive = []  # what the structure points to
    if importances is not None:
        arrays = np.load(importances)
        entries = ffi.new("struct llama_model_imatrix_data[]", len(arrays.files) + 1)  # the last has no name
        for entry, name in zip(entries, arrays.files, strict=False):
            alive += [ffi.new("char[]", name.encode()), arrays[name]]
            entry.name, entry.data = alive[-2], ffi.cast("float *", alive[-1].ctypes.data)
            entry.size = alive[-1].size
        params.imatrix = entries
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(file), params):
        sys.exit(1)  # llama.cpp has printed why


# --- both ------------------------------------------------------------------------------------------------------------


def _require_tool_path(name: str, purpose: str, hint: str) -> str:
    """Return the path of a program of llama.cpp, in `$LLAMA_CPP` or on the PATH, or raise ModelError."""
    root = os.environ.get("LLAMA_CPP")
    places = [Path(root, below, name) for below in ("", "build/bin")] if root else []
    path = next((str(p) for p in places if p.is_file()), None) or shutil.which(name)
    if path is None:
        raise ModelError(
            f"llama.cpp's {name}, which {purpose}, is not installed",
            f"{name} on the PATH or in $LLAMA_CPP",
            hint,
            code="llama-cpp-tools",
        )
    return path


def _run_tool(command: Sequence[str], name: str = QUANTIZER) -> str:
    """Run a program of llama.cpp; return what it printed."""
    done = subprocess.run([*command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        log.debug("%s\n%s", shlex.join(command), "\n".join(lines))
        raise LlamaCppToolFailedError(
            f"llama.cpp's {name} failed: {lines[-1]}", "an architecture and tokenizer that it knows"
        )
    return done.stderr + done.stdout


if __name__ == "__main__":
    _quantize_here(*sys.argv[1:])
