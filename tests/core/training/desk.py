"""The command line of `slimtune train`, as a user types it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import write_rows


class Desk:
    """A user's folder: a base, rows, and the command line."""

    def __init__(self, base: Path, folder: Path, run: Callable[..., Any]) -> None:
        self.base, self.folder, self.out, self.run = base, folder, folder / "run", run
        self.rows = write_rows(folder / "rows.jsonl", 8)

    def train(self, *more: str, **instead: str) -> Any:
        flags = {"model": str(self.base), "data": str(self.rows), "out": str(self.out), "dtype": "float32", **instead}
        steps = [] if {"--epochs", "--resume"} & set(more) else ["--max-steps", "2"]
        return self.run("train", *(x for k, v in flags.items() for x in (f"--{k}", v)), *steps, *more)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def assert_nothing_written(self) -> None:
        assert not self.out.exists()
        assert [p for p in self.folder.rglob("*") if p.name.startswith(".checkpoint") or p.suffix == ".tmp"] == []


def refused(result: Any, code: int, *parts: str) -> None:
    """Assert that a command ended with one message that contains every part; 2: what the user typed, 1: the work."""
    message = " ".join(result.stderr.split())
    assert result.exit_code == code, message
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    assert [part for part in parts if part not in message] == [], message
