"""The folder of one run: the names of its files, and how they are written and read.

    recipe.yaml     the resolved recipe              train.log          log messages of the training
    plan.json       the plan and the memory probe    report.html        everything on one page
    data.json       `slimtune data` on its rows      result.json        what `slimtune train --json` printed
    adapter/        the best adapter                 eval-<name>.json   what `slimtune eval --json` printed
    checkpoints/    to resume from                   scores-<name>.json losses of each evaluated row
    metrics.jsonl   one JSON object per line         tensorboard/       event files, with train.report_to
    fingerprint.json        what it is trained on: weights, config, tokenizer, template, rows, recipe
    reference.safetensors   log-probabilities of the rows before training, for objectives that need them

Files are written under a temporary name and then renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from ...errors import RunError, UsageError, format_names, suggest
from ..config import Recipe, load_recipe
from ..foundation.files import (
    parse_json,
    refuse_non_regular_file,
    require_writable,
    to_json,
    translate_os_errors,
    write_atomic,
)
from ..foundation.registry import Registry

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "config.json"
"""The base's config with the names of the classes, beside the adapter of a classifier."""
INIT_ADAPTER = "start"
"""Folder in a run folder with the adapter that the run started from, so that the run can be resumed without it."""
LOCK_FILE, WRITER_FILE = ".lock", ".writer.json"
WRITTEN_FILES = (
    "recipe.yaml", "plan.json", "data.json", "metrics.jsonl", "result.json", "report.html",
    "fingerprint.json", "reference.safetensors", WRITER_FILE,
)  # fmt: skip
"""Files of a run folder that are written under a temporary name first, `.<name>.<random>`."""


def is_temporary_file_name(name: str) -> bool:
    """Return whether a file of a run folder has a temporary name; what a user has hidden there is called otherwise."""
    return any(name.startswith(f".{written}.") for written in WRITTEN_FILES)


class _Entry:
    """Attribute of RunDir: the path of a file or folder in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunDir, owner: type) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    recipe_file = _Entry("recipe.yaml")
    plan_file = _Entry("plan.json")
    data_file = _Entry("data.json")
    metrics_file = _Entry("metrics.jsonl")
    log_file = _Entry("train.log")
    result_file = _Entry("result.json")
    report_file = _Entry("report.html")
    adapter = _Entry("adapter")
    checkpoints = _Entry("checkpoints")
    tensorboard = _Entry("tensorboard")
    reference_file = _Entry("reference.safetensors")
    fingerprint_file = _Entry("fingerprint.json")

    def evaluation_file(self, evaluation: str) -> Path:
        """Return the file of an evaluation: "test", "validation", or "data-" and the name of the evaluated file."""
        return self.path / f"eval-{evaluation}.json"

    def scores_file(self, evaluation: str) -> Path:
        """Return the file with the losses of each row of an evaluation."""
        return self.path / f"scores-{evaluation}.json"

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, write_files: Callable[[Self], None] = lambda _: None) -> Self:
        """Create a run folder, which must not have files yet, and write the recipe into it.

        `write_files(run)` writes what belongs to the start, before the recipe: a folder with a recipe can be resumed.
        """
        run = cls.require_free(path)
        with translate_os_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        write_files(run)
        write_atomic(run.recipe_file, recipe.to_yaml())
        return run

    @classmethod
    def require_free(cls, path: str | Path) -> Self:
        """Return the run folder that can be created at `path`, where nothing exists yet; writes nothing."""
        run = cls(Path(path))
        if run.path.exists() and not run.path.is_dir():
            raise UsageError(f"{run.path} is a file", "a folder that does not exist yet", "give another --out")
        # A start that was killed leaves temporary files and the lock.
        names = sorted(p.name for p in run.path.iterdir()) if run.path.is_dir() else []
        if names := [n for n in names if n not in (LOCK_FILE, WRITER_FILE) and not is_temporary_file_name(n)]:
            is_run = run.recipe_file.name in names
            raise UsageError(
                f"{run.path} already contains {'another run' if is_run else 'files'}: {format_names(names)}",
                "a folder that is empty or does not exist yet",
                f"{'continue that run with --resume, or ' if is_run else ''}give another --out",
            )
        require_writable(run.path)
        return run

    @classmethod
    def open(cls, path: str | Path, require_adapter: bool = True) -> Self:
        """Return the run folder at `path`; raise if there is none, or if it has no adapter yet and must have one."""
        run = cls(Path(path))
        if not run.path.is_dir():
            siblings = [p.name for p in run.path.parent.iterdir() if p.is_dir()] if run.path.parent.is_dir() else []
            raise UsageError(f"there is no run folder {str(run.path)!r}{suggest(run.path.name, siblings)}")
        if not run.recipe_file.is_file():
            names = format_names(sorted(p.name for p in run.path.iterdir()))
            message = f"{run.path} is not a run folder: it contains {names or 'nothing'}"
            raise UsageError(message, "a folder with recipe.yaml")
        file = run.adapter / ADAPTER_FILE
        if require_adapter and not file.is_file():
            message = f"the run in {run.path} has no adapter yet"
            raise RunError(message, str(file), f"finish it: {run.resume_command()}", code="resume")
        return run

    def resume_command(self) -> str:
        """Return the command that continues the run's training, as a shell takes it."""
        return f"slimtune train {shlex.quote(str(self.recipe_file))} --resume"

    def load_recipe(self) -> Recipe:
        """Return the recipe of the run, with `output_dir` set to where the folder is now."""
        return load_recipe(self.recipe_file, {"output_dir": str(self.path)})

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one JSON line to the metrics, after removing a last line that a killed run left unfinished."""
        line = to_json(values).encode() + b"\n"
        with translate_os_errors(self.metrics_file, len(line)):
            refuse_non_regular_file(self.metrics_file, follow_links=False)
            with open(self.metrics_file, "ab+") as f:
                if f.seek(0, os.SEEK_END):
                    f.seek(-1, os.SEEK_END)
                    if f.read(1) != b"\n":
                        f.truncate(self.metrics_file.read_bytes().rfind(b"\n") + 1)
                f.write(line)

    def load_metrics(self, errors: list[str] | None = None) -> list[dict[str, Any]]:
        """Return the metrics, oldest first. A last line that a killed run left unfinished is ignored.

        A damaged line is a RunError; with `errors`, it is left out and named there.
        """
        metrics = []
        content = self.metrics_file.read_bytes() if self.metrics_file.is_file() else b""
        lines = content.decode("utf-8", "replace").split("\n")[:-1]  # a text may contain other ends of lines
        for number, line in enumerate(lines, 1):
            try:
                values, damage = parse_json(line), "it is no JSON object"
            except ValueError as e:
                values, damage = None, str(e)
            if isinstance(values, dict):
                metrics.append(values)
                continue
            message = f"{self.metrics_file}, line {number}: {damage}: {line[:80]!r}"
            if errors is None:
                raise RunError(message, "one JSON object per line", "delete the line")
            errors.append(message)
        return metrics


class RunLock(Protocol):
    """One writer per run folder, which must exist: the other gets a UsageError, or a RunError if it lost the lock."""

    def acquire(self) -> None: ...

    def release(self) -> None: ...

    def require_held(self) -> None: ...


RUN_LOCKS: Registry[Callable[[RunDir], RunLock]] = Registry("slimtune.run_locks", "lock of a run folder")


def find_adapter_folder(path: str | Path) -> Path:
    """Return the adapter folder of a run folder; an adapter folder is returned as it is."""
    path = Path(path)
    is_adapter = any((path / name).is_file() for name in (ADAPTER_FILE, "adapter_config.json"))
    return path if is_adapter else RunDir.open(path).adapter
