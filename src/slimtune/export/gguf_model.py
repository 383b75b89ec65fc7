"""A whole model as one GGUF file, which Ollama and llama.cpp read without anything beside it.

    base was a GGUF      its own metadata and tokenizer, with the tensors of now: nothing else is needed
    base was anything    llama.cpp's `convert_hf_to_gguf.py`, which knows how each tokenizer splits text

Both write what `PRECISIONS` lists. Anything else (Q4_K_M, …) is then llama.cpp's `llama-quantize`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, RunError, format_names
from .architectures import as_llama_cpp, get_architecture, get_tensor_names, package

PRECISIONS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What can be written here, with gguf's name for it."""
_ADAPTERS = re.compile(r"(^|\.)(adapters|trained_copies)\.")
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
_WHERE = "put a checkout of llama.cpp on the disk and set LLAMA_CPP to its folder"


def like(template: Path, model: Any, file: Path, precision: str = "f16") -> int:
    """Write a model as the GGUF its base came from: metadata and tokenizer from there, tensors from the model.

    One tensor is in memory at a time, beside the model's own.

    Args:
        template: the base's GGUF file.
        model: a model of that architecture. Of an adapted one the base is written, with what is merged into it now.
        file: what to write, in a folder that is not yet in use.
        precision: one of `PRECISIONS`; vectors stay in f32.

    Returns:
        bytes of the file.

    Raises:
        UsageError: the architecture is not known.
        ModelError: template and model do not have the same tensors.
    """
    gguf, facts, names = package(), get_architecture(model.config), get_tensor_names(model.config)
    kind = gguf.GGMLQuantizationType[PRECISIONS[precision]]
    reader = gguf.GGUFReader(str(template))
    own = {_named(names, n): (n, p) for n, p in model.named_parameters() if not _ADAPTERS.search(n)}
    asked = [t.name for t in reader.tensors]
    lacking = [n for n in asked if n not in own and not n.startswith("rope")]
    if lacking or None in own:
        unnamed = [own[None][0]] if None in own else []
        raise ModelError(
            f"the model and {template.name} do not hold the same tensors: {format_names([*lacking, *unnamed], 4)}",
            f"a GGUF of the architecture {facts.arch}, and the model that was loaded from it",
        )
    words, rows = reader.fields.get(gguf.Keys.Tokenizer.LIST), model.get_input_embeddings().weight.shape[0]
    if words is not None and len(words.data) != rows:
        raise ModelError(
            f"the model embeds {rows} tokens, the tokenizer in {template.name} has {len(words.data)}",
            "the tokens of the base: a GGUF's tokenizer is taken as it is",
            "slimtune merge, and llama.cpp's converter",
        )
    writer = gguf.GGUFWriter(str(file), facts.arch)
    for field in reader.fields.values():
        if field.name not in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) and not _of_header(field):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], of)
    writer.add_file_type(_file_types(gguf)[precision])
    # A head that was tied, and is not any more, has a tensor of its own now.
    order = [*asked, *(n for n in own if n not in asked)]
    kept = {t.name: t for t in reader.tensors if t.name not in own}

    def array(name: str) -> tuple[Any, Any]:
        if name in kept:
            return kept[name].data, kept[name].tensor_type
        called, parameter = own[name]
        values = as_llama_cpp(parameter.detach(), called, model.config).to(torch.float32).cpu().contiguous().numpy()
        stored = kind
        if values.ndim == 1:
            stored = gguf.GGMLQuantizationType.F32
        elif values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            stored = gguf.GGMLQuantizationType.F16  # rows are no whole number of blocks
        return gguf.quants.quantize(values, stored), stored

    for name in order:
        data, stored = array(name)
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        writer.write_tensor_data(array(name)[0])
    writer.close()
    return file.stat().st_size


def converted(folder: Path, file: Path, precision: str = "f16") -> int:
    """Write a Hugging Face folder as GGUF by llama.cpp's own converter; return the bytes of the file.

    Raises:
        ModelError: the converter is not there.
        RunError: it failed; its last words are given.
    """
    script = found(CONVERTER)
    if script is None:
        raise ModelError(
            f"a base that is no GGUF itself becomes one by llama.cpp's {CONVERTER}, which is not here",
            f"{CONVERTER} on the PATH or in $LLAMA_CPP",
            f"{_WHERE}; or ship the adapter beside its base",
        )
    command = [sys.executable, script, str(folder), "--outfile", str(file), "--outtype", precision]
    _run(command, CONVERTER)
    return file.stat().st_size


def quantized(file: Path, out: Path, kind: str) -> int:
    """Write a GGUF in another precision by llama.cpp's `llama-quantize`; return the bytes of the file.

    Args:
        file: an f32, f16 or bf16 GGUF.
        out: what to write.
        kind: as llama.cpp names it: "Q4_K_M".

    Raises:
        ModelError: the program is not there.
        RunError: it failed; its last words are given.
    """
    _run([quantizer(kind), str(file), str(out), kind], QUANTIZER)
    return out.stat().st_size


def quantizer(kind: str) -> str:
    """Return where `llama-quantize` lies, which makes what is not in `PRECISIONS`.

    Raises:
        ModelError: it is not there.
    """
    program = found(QUANTIZER)
    if program is None:
        raise ModelError(
            f"{kind} is made by llama.cpp's {QUANTIZER}, which is not here",
            f"{QUANTIZER} on the PATH or in $LLAMA_CPP, or one of {format_names(PRECISIONS)}",
            f"{_WHERE}; or --quantize q8_0",
        )
    return program


def found(name: str) -> str | None:
    """Return where a program of llama.cpp's lies: on the PATH, or in `$LLAMA_CPP` and what is built there."""
    places = [Path(root, below) for root in filter(None, [os.environ.get("LLAMA_CPP")]) for below in ("", "build/bin")]
    return next((str(p / name) for p in places if (p / name).is_file()), None) or shutil.which(name)


def _run(command: Iterable[str], name: str) -> None:
    done = subprocess.run([*command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise RunError(f"llama.cpp's {name} failed:\n{words}", "an architecture and tokenizer it knows")


def _named(names: Any, parameter: str) -> str | None:
    module, _, what = parameter.rpartition(".")
    name = names.get_name(module)
    return f"{name}.{what}" if name else None


def _of_header(field: Any) -> bool:
    return field.name.startswith(("GGUF.", "split.")) or field.name == "general.alignment"


def _file_types(gguf: Any) -> dict[str, Any]:
    kinds = gguf.LlamaFileType
    return {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "bf16": kinds.MOSTLY_BF16, "q8_0": kinds.MOSTLY_Q8_0}
