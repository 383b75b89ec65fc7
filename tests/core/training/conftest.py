"""A recipe that trains in a second, on the tiny base."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from tiny_run import recipe_of, write_settings

from slimtune.core.training.train import train
from slimtune.core.training.train_result import TrainResult


@pytest.fixture(scope="session")
def shared_settings(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]
) -> dict[str, Any]:
    """Settings of a recipe: 24 rows, 6 a step, 2 epochs of 4 steps. The files are shared: change only copies."""
    return write_settings(tmp_path_factory.mktemp("training"), tiny_llama, tiny_tokenizer)


@pytest.fixture
def settings(shared_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**copy.deepcopy(shared_settings), "output_dir": str(tmp_path / "run")}


@pytest.fixture
def desk(tiny_folder: Path, tmp_path: Path, slimtune: Callable[..., Any]) -> Desk:
    return Desk(tiny_folder, tmp_path, slimtune)


@pytest.fixture(scope="session")
def whole_run(shared_settings: dict[str, Any]) -> TrainResult:
    """Result of a run of these settings from start to end."""
    return train(recipe_of(shared_settings))
