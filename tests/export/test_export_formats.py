"""The table of docs/export.md, method × export format, made by attaching each method to a tiny Llama.

python tests/export/test_export_formats.py        prints it
"""

import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "methods")]
import pytest
import torch
from cases import CASES
from models_zoo import llama, shake

import slimtune
from slimtune.adapters.base import MergeUnsupported
from slimtune.adapters.export_formats import get_export_formats
from slimtune.errors import SlimtuneError
from slimtune.export.gguf import get_lora_factors
from slimtune.export.vllm import list_vllm_refusals

PAGE = Path(__file__).parents[2] / "docs/export.md"
HEAD = (
    "| method | merged: folder, GGUF, Ollama, vLLM | adapter: llama.cpp, Ollama | adapter: vLLM | nearest LoRA |\n"
    "| --- | --- | --- | --- | --- |"
)
SHOWN = [name for name in CASES if "+" not in name or name in ("lora+dora", "lora+pissa", "lora+tokens")]


def attached(name: str) -> Any:
    with warnings.catch_warnings(action="ignore"):
        model: Any = slimtune.get_peft_model(llama(dtype=torch.float32), CASES[name]())
    shake(model)
    return model


def works(what: Any) -> str:
    with suppress(SlimtuneError, MergeUnsupported):
        what()
        return "yes"
    return "–"


def row(name: str) -> str:
    model = attached(name)
    cells = [
        works(lambda: model.merge_adapter() or model.unmerge_adapter()),
        works(lambda: get_lora_factors(model)),
        "–" if any(list_vllm_refusals(model, "default")) else "yes",
        works(lambda: model.to_lora("default", 4)),
    ]
    return f"| {name.replace('+', ', ')} | {' | '.join(cells)} |"


def table() -> str:
    return "\n".join([HEAD, *map(row, sorted(SHOWN))])


def test_the_docs_table():
    assert table() in PAGE.read_text()


@pytest.mark.parametrize("name", SHOWN)
def test_get_export_formats_without_exporting(name):
    merged, gguf, vllm, as_lora = (cell.strip() == "yes" for cell in row(name).split("|")[2:6])
    ways = get_export_formats(attached(name))
    assert (ways.merged, ways.gguf, ways.vllm) == (merged, gguf, vllm)
    assert not ways.as_lora or as_lora


if __name__ == "__main__":
    print(table())
