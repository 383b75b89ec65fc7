"""The folder an export is written into: whole or not there, and with a note of what it was made from.

`slimtune_export.json` in it says so; `slimtune verify FOLDER` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError, format_names
from ..run_dir import to_json

NOTE = "slimtune_export.json"


def require_free(out: Path) -> None:
    """Check that nothing lies where an export is to be written.

    Raises:
        UsageError: `out` is a file, or a folder that holds something.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "a folder that does not exist yet", "give another --out")
    if out.is_dir() and (held := sorted(p.name for p in out.iterdir())):
        raise UsageError(
            f"{out} already holds files: {format_names(held)}",
            "a folder that is empty or does not exist yet",
            "give another --out",
        )


def write_note(folder: Path, kind: str, run: Path, facts: Mapping[str, Any]) -> None:
    """Write down what an export is.

    Args:
        folder: the export's.
        kind: "merged", "gguf", "ollama" or "vllm".
        run: the run or adapter folder it was made from.
        facts: what else to know, as JSON has it.
    """
    note = {"kind": kind, "run": str(run.resolve()), **facts}
    (folder / NOTE).write_text(to_json(note, indent=2) + "\n", encoding="utf-8")


def read_note(folder: Path) -> dict[str, Any] | None:
    """Return what `write_note` wrote, None where the folder is no export of ours.

    Raises:
        UsageError: the note is damaged.
    """
    file = folder / NOTE
    if not file.is_file():
        return None
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return {**note, "kind": str(note["kind"]), "run": Path(note["run"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is damaged: {error}", "the note an export leaves", "export again") from error
