"""Rows, and a planner made by hand, for commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_plan import hand_plan

import slimtune.planning.planner as planner


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """An empty file of rows."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    return file


@pytest.fixture
def replace_planner(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replace the planner: `replace_planner(make)` plans by `make(request)`, by default a plan made by hand.

    Returns the requests it gets.
    """

    def replace(make: Callable[[Any], Any] = lambda r: hand_plan(r.method.name, r.gpu)) -> list[Any]:
        requests: list[Any] = []

        def make_plan(request: Any, *, advise: bool = True) -> Any:
            requests.append(request)
            return make(request)

        monkeypatch.setattr(planner, "make_plan", make_plan)
        return requests

    return replace
