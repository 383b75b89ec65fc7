"""The table method × destination of docs/export.md, made by attaching each method to a tiny Llama and asking the code.

python tests/export/test_destinations.py        prints it
"""

from __future__ import annotations

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
from slimtune.adapters.export_formats import get_export_formats, lora_incompatibilities
from slimtune.errors import SlimtuneError
from slimtune.export.gguf import pairs_of
from slimtune.export.vllm import _form

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
        works(lambda: pairs_of(model)),
        "–" if lora_incompatibilities(model.active_peft_config) or _form(model, "default") else "yes",
        works(lambda: model.to_lora("default", 4)),
    ]
    return f"| {name.replace('+', ', ')} | {' | '.join(cells)} |"


def table() -> str:
    return "\n".join([HEAD, *map(row, sorted(SHOWN))])


def test_the_page_says_what_the_code_does():
    assert table() in PAGE.read_text()


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_notes_the_ways_that_its_adapter_has(name):
    """What is answered without doing it is what doing it shows."""
    merged, gguf, vllm, as_lora = (cell.strip() == "yes" for cell in row(name).split("|")[2:6])
    ways = get_export_formats(attached(name))
    assert (ways.merged, ways.gguf, ways.vllm) == (merged, gguf, vllm)
    assert not ways.as_lora or as_lora


if __name__ == "__main__":
    print(table())
