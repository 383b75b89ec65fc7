"""A run to talk to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_run import make_run


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    return make_run(tmp_path / "run", tiny_folder)


@pytest.fixture(scope="module")
def shared_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]
) -> Path:
    """The same run, for the tests of a module that only read it."""
    base = tmp_path_factory.mktemp("shared") / "tiny-base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    return make_run(base.with_name("run"), base)
