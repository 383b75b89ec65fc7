"""Rows, and a planner made by hand, for commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_plan import hand_plan
from tiny_run import write_rows

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

        def estimate_resources(request: Any, *, advise: str = "all") -> Any:
            requests.append(request)
            return make(request)

        monkeypatch.setattr(planner, "estimate_resources", estimate_resources)
        monkeypatch.setattr(planner, "judge_run", lambda request: estimate_resources(request).verdict)
        return requests

    return replace


@pytest.fixture(scope="package")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    slimtune: Callable[..., Any],
) -> Path:
    """A folder with a base, rows, a recipe and a run."""
    folder = tmp_path_factory.mktemp("screens")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", 40)
    write_rows(folder / "held_out.jsonl", 12, start=100)
    (folder / "recipe.yaml").write_text(
        "model: base\ndata: {train: rows.jsonl, test: held_out.jsonl}\ntrain: {batch_size: 4}\n"
    )
    (folder / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\nno row\n')
    done = slimtune("train", "--model", folder / "base", "--data", folder / "rows.jsonl", "--out", folder / "run",
                    "--max-steps", 1, "--dtype", "float32")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder
