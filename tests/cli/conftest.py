"""Commands run in this process, 80 columns wide."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_plan import hand_plan
from typer.testing import CliRunner

import slimtune.planning.planner as planner
from slimtune.cli import app


@pytest.fixture(scope="session")
def slimtune() -> Callable[..., Any]:
    """Run a command: `slimtune("plan", "gpt2")`."""

    def run(*args: object, stdin: str = "", columns: int = 80) -> Any:
        return CliRunner().invoke(
            app, [str(a) for a in args], input=stdin, env={"COLUMNS": str(columns)}, prog_name="slimtune"
        )

    return run


@pytest.fixture(scope="session")
def slimtune_json(slimtune: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command with --json, which must succeed, and return what it prints."""

    def run(*args: object) -> Any:
        done = slimtune(*args, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    return run


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
