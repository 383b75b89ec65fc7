"""The manifest of an export folder: what it is and which run it was made from. `slimtune verify FOLDER` reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.foundation.files import read_json, write_json
from ..errors import UsageError, format_names, nearest

Target = Literal["gguf", "ollama", "vllm"]
EXPORT_MANIFEST, ADAPTER_GGUF, MODEL_GGUF = "export_manifest.json", "adapter.gguf", "model.gguf"


def require_target(target: str) -> None:
    """Raise UsageError unless it is a target of an export."""
    if target not in (targets := get_args(Target)):
        raise UsageError(f"unknown target {target!r}{nearest(target, targets)}", format_names(targets))


def write_manifest(folder: Path, kind: str, run: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: kind ("merged", "gguf", "ollama", "vllm"), the run or adapter folder, and further facts."""
    write_json(folder / EXPORT_MANIFEST, {"kind": kind, "run": str(run.resolve()), **facts})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, with `run` as a path; None if the folder has none.

    Raises:
        RunError: it is damaged.
        UsageError: it does not say what it was made from.
    """
    file = folder / EXPORT_MANIFEST
    if not file.is_file():
        return None
    manifest = read_json(file)
    if not {"kind", "run"} <= manifest.keys():
        raise UsageError(f"{file} has no kind and run", "the manifest that an export writes", "export again")
    return {**manifest, "run": Path(manifest["run"])}
