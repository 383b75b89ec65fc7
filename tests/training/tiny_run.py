"""Rows and recipes that train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimtune.config import Recipe


def write_rows(path: Path, n: int, start: int = 0, answer: str = "abc ") -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer * (1 + i % 5)}]}
        for i in range(start, start + n)
    )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def recipe_of(settings: dict[str, Any], **train: Any) -> Recipe:
    return Recipe.from_dict({**settings, "train": {**settings["train"], **train}})
