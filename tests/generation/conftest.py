"""A run to talk to."""

from pathlib import Path

import pytest
from hand_run import make_run


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    return make_run(tmp_path / "run", tiny_folder)
