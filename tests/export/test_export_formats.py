"""The table of docs/export.md, method × export format, made by attaching each method to a tiny Llama.

python tests/export/test_export_formats.py        writes it (docs/internals/make_methods.py does so, too)
"""

import re
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "methods")]
import pytest
import torch
from method_cases import CASES
from models_zoo import llama, shake

import slimtune
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.errors import SlimtuneError
from slimtune.export.export_support import get_export_support_flags
from slimtune.export.gguf import get_lora_factors_and_scales
from slimtune.export.vllm import list_unfixable_and_convertible_vllm_refusals

PAGE = Path(__file__).parents[2] / "docs/export.md"
HEAD = "| method | merged: folder, GGUF, Ollama, vLLM | adapter: llama.cpp, Ollama | adapter: vLLM | nearest LoRA |"
SHOWN = [name for name in CASES if "+" not in name or name in ("lora+dora", "lora+pissa", "lora+tokens")]


def works(what: Any) -> bool:
    with suppress(SlimtuneError, MergeUnsupported):
        what()
        return True
    return False


@cache
def try_formats(name: str) -> tuple[Any, list[bool]]:
    """Return the formats a method says it supports, and those that work: merged, GGUF, vLLM, nearest LoRA."""
    with warnings.catch_warnings(action="ignore"):
        model: Any = slimtune.get_peft_model(llama(dtype=torch.float32), CASES[name]())
    shake(model)
    formats = get_export_support_flags(model)
    merges = works(lambda: model.merge_adapter() or model.unmerge_adapter())
    vllm = not any(list_unfixable_and_convertible_vllm_refusals(model, "default"))
    return formats, [
        merges,
        works(lambda: get_lora_factors_and_scales(model)),
        vllm,
        works(lambda: model.to_lora("default", 4)),
    ]


def table() -> str:
    rows = [HEAD, "| --- | --- | --- | --- | --- |"]
    for name in sorted(SHOWN):
        cells = ["yes" if found else "–" for found in try_formats(name)[1]]
        rows.append(f"| {name.replace('+', ', ')} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_docs_table():
    assert table() in PAGE.read_text(), "run python docs/internals/make_methods.py"


@pytest.mark.parametrize("name", SHOWN)
def test_get_export_formats(name):
    formats, (merged, gguf, vllm, as_lora) = try_formats(name)
    assert (formats.merged, formats.gguf, formats.vllm) == (merged, gguf, vllm)
    assert not formats.as_lora or as_lora


if __name__ == "__main__":
    PAGE.write_text(re.sub(re.escape(HEAD) + r"\n(\|[^\n]*\n)+", lambda _: table(), PAGE.read_text(), count=1))
