"""A recipe that trains in a second, on the tiny base."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from tiny_run import recipe_of, write_rows

from slimtune.core.training.train import train


@pytest.fixture(scope="session")
def shared_settings(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]
) -> dict[str, Any]:
    """Settings of a recipe: 24 rows, 6 a step, 2 epochs of 4 steps. The files are shared: change only copies."""
    home = tmp_path_factory.mktemp("training")
    tiny_llama().save_pretrained(home / "base")
    tiny_tokenizer().save_pretrained(home / "base")
    return {
        "model": {"name": str(home / "base"), "dtype": "float32"},
        "data": {
            "train": str(write_rows(home / "train.jsonl", 24)),
            "validation": str(write_rows(home / "validation.jsonl", 6, start=100)),
        },
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2},
        "output_dir": str(home / "whole"),
    }


@pytest.fixture
def settings(shared_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**copy.deepcopy(shared_settings), "output_dir": str(tmp_path / "run")}


@pytest.fixture
def desk(tiny_folder: Path, tmp_path: Path, slimtune: Callable[..., Any]) -> Desk:
    return Desk(tiny_folder, tmp_path, slimtune)


@pytest.fixture(scope="session")
def whole_run(shared_settings: dict[str, Any]) -> dict[str, Any]:
    """Result of a run of these settings from start to end."""
    return train(recipe_of(shared_settings))
