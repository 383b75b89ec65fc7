"""A recipe that trains in a second, on the tiny base."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_rows


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a recipe: 24 rows, 6 a step, 2 epochs of 4 steps."""
    return {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", 24)),
            "validation": str(write_rows(tmp_path / "validation.jsonl", 6, start=100)),
        },
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2},
        "output_dir": str(tmp_path / "run"),
    }
